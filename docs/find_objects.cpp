// Finds objects in an image by a package of `python -m fastmrcnn.export --format pt2 --aot cpu`, with libtorch
// alone, which the torch package of Python has in it. With T the folder of that package:
//   g++ -std=c++20 find_objects.cpp -o find_objects -I$T/include -I$T/include/torch/csrc/api/include -L$T/lib \
//     -Wl,-rpath,$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
// For a package of `--aot cuda`, which has not been tried, add -ltorch_cuda.

#include <fstream>
#include <iostream>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

// find_objects model.pt2 pixels.rgb H W: the objects in H x W pixels of RGB, row by row, a byte a channel.
// Prints a line for each: class, score, and the corners of its box.
int main(int count, char** arguments) {
  if (count != 5) {
    std::cerr << "find_objects model.pt2 pixels.rgb H W\n";
    return 2;
  }
  const int64_t height = std::stoll(arguments[3]), width = std::stoll(arguments[4]);
  auto pixels = torch::zeros({1, height, width, 3}, torch::kUInt8);
  std::ifstream file(arguments[2], std::ios::binary);
  if (!file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel())) {
    std::cerr << arguments[2] << ": has fewer than " << pixels.numel() << " bytes\n";
    return 1;
  }
  const auto sizes = torch::tensor({{height, width}}, torch::kInt32);

  c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  auto told = loader.get_metadata();
  const bool on_gpu = told["AOTI_DEVICE_KEY"] == "cuda";
  const torch::Device device(on_gpu ? torch::kCUDA : torch::kCPU);
  auto outputs = loader.run({pixels.to(device), sizes.to(device)});
  const auto boxes = outputs[0].cpu(), scores = outputs[1].cpu(), classes = outputs[2].cpu();
  const auto valid = outputs[3].cpu();

  for (int64_t slot = 0; slot < valid.size(1) && valid[0][slot].item<bool>(); ++slot) {
    const auto box = boxes[0][slot];
    std::cout << classes[0][slot].item<int64_t>() << " " << scores[0][slot].item<float>();
    for (int64_t side = 0; side < 4; ++side) std::cout << " " << box[side].item<float>();
    std::cout << "\n";
  }
}
