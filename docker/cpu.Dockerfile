# The service on a CPU. From the folder of the clone:
#
#   docker build -f docker/cpu.Dockerfile -t fastmrcnn-serve .
#   docker run --rm --init -p 127.0.0.1:8000:8000 -v ./runs/run_001:/model:ro fastmrcnn-serve
FROM python:3.12-slim

# Everything is a wheel; nothing is compiled, so no compiler is in the image.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MPLCONFIGDIR=/tmp/matplotlib

# torch by itself, in PyTorch's own build without CUDA, so that a change of the program keeps this layer.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install "torch>=2.11,<2.14" --index-url "$TORCH_INDEX"

WORKDIR /src
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY kernels kernels
COPY configs configs
COPY fastmrcnn fastmrcnn
# What it needs is bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install ".[serve]" && rm -rf /src/*

RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin serve
USER 10001
WORKDIR /

EXPOSE 8000
# Unhealthy until the model is warmed up, while it is stopping, and if it does not answer.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# 0.0.0.0 within the container: who may reach it is said by -p.
ENTRYPOINT ["python", "-m", "fastmrcnn.serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--checkpoint", "/model"]
