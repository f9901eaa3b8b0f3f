# The service on an NVIDIA GPU. From the folder of the clone:
#
#   docker build -f docker/cuda.Dockerfile -t fastmrcnn-serve:cuda .
#   docker run --rm --init --gpus all -p 127.0.0.1:8000:8000 -v ./runs/run_001:/model:ro fastmrcnn-serve:cuda
#
# torch's wheel has the CUDA libraries in it: the host needs the driver and NVIDIA's container toolkit.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TRITON_CACHE_DIR=/cache/triton

# Triton compiles its kernels' launchers when they first run; Python's headers are in the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch by itself, so that a change of the program keeps this layer, which is the largest by far.
RUN pip install "torch>=2.11,<2.14"

WORKDIR /src
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY kernels kernels
COPY configs configs
COPY fastmrcnn fastmrcnn
# What it needs is bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install ".[serve]" && rm -rf /src/*

# Give /cache a volume, and a new container compiles nothing again.
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin serve \
    && install --directory --owner serve /cache
USER 10001
WORKDIR /

EXPOSE 8000
# Unhealthy until the model is warmed up, while it is stopping, and if it does not answer.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# 0.0.0.0 within the container: who may reach it is said by -p.
ENTRYPOINT ["python", "-m", "fastmrcnn.serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--checkpoint", "/model", "--device", "cuda"]
