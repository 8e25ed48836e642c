# syntax=docker/dockerfile:1
# One image for the head, the workers and submitting machines, on Kubernetes or any machine with NVIDIA's container toolkit.
#
#   docker build -t registry.example.com/pia-batch:0.1.0 .
#   docker run --rm --gpus all --shm-size 4g registry.example.com/pia-batch:0.1.0 pia-batch demo
#
# torch's wheels contain CUDA's libraries, so that the base needs none; the node needs a driver of 580 or newer (CUDA 13).
# When you build for others, pin the base by its digest too: FROM python:3.12.13-slim-bookworm@sha256:...
FROM python:3.12.13-slim-bookworm

LABEL org.opencontainers.image.title="pia-batch" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# KubeRay checks the health of a node by wget. Debian has one version of it at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*

# Into /usr/local, not a virtual environment: KubeRay starts Ray from a login shell, which resets PATH.
# Only packages of requirements.lock are installed, with its hashes; no file of the build stays in a layer.
RUN --mount=type=bind,source=requirements.lock,target=/build/requirements.lock \
    python -m pip install --no-cache-dir --require-hashes -r /build/requirements.lock
RUN --mount=type=bind,target=/build,rw \
    python -m pip install --no-cache-dir --no-deps --no-build-isolation /build
COPY jobs /opt/pia_batch/jobs

# A numeric user, so that Kubernetes can see that it is not root. Weights are kept in /cache: mount a local disk there.
RUN useradd --uid 1000 --create-home pia && install -d -o pia -g pia /cache
USER 1000:1000
WORKDIR /home/pia

ENV RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HOME=/cache/hub \
    PIA_BATCH_CACHE=/cache/weights \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

CMD ["pia-batch", "--help"]
