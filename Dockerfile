# The specmoe command as an image: a virtual environment on a slim base, an unprivileged user, no torch.
#
#   docker build --tag specmoe .                                the service
#   docker build --tag specmoe-training --target training .     the same with torch, for `specmoe train`
#   sudo deploy/build-image.sh                                  the same file without a docker engine
#
# BASE carries Python 3.11 with venv. For CUDA, take one that carries the CUDA and cuDNN libraries as well.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# A folder of wheels inside the build context: given, nothing is downloaded; empty, pip asks its index.
ARG WHEELS=
# "cpu" leaves out ONNX Runtime's CUDA and TensorRT providers, more than half of the image.
ARG RUNTIME=gpu
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# pip stays behind in a virtual environment of its own.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/specmoe
RUN --mount=type=bind,target=/src --mount=type=cache,target=/var/cache/pip \
    /opt/pip/bin/pip --python /opt/specmoe/bin/python install --constraint /src/constraints.txt \
        ${WHEELS:+--no-index --find-links "/src/${WHEELS}"} /src
RUN case "${RUNTIME}" in \
        gpu) ;; \
        cpu) find /opt/specmoe -name 'libonnxruntime_providers_cuda.so' -delete \
                -o -name 'libonnxruntime_providers_tensorrt.so' -delete ;; \
        *) echo "RUNTIME is '${RUNTIME}'; expected gpu or cpu." >&2; exit 1 ;; \
    esac

FROM build AS build-training
ARG WHEELS=
RUN --mount=type=bind,target=/src --mount=type=cache,target=/var/cache/pip \
    /opt/pip/bin/pip --python /opt/specmoe/bin/python install --constraint /src/constraints.txt \
        ${WHEELS:+--no-index --find-links "/src/${WHEELS}"} '/src[training]'

FROM ${BASE} AS unprivileged
RUN groupadd --gid 10001 specmoe \
    && useradd --uid 10001 --gid specmoe --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin specmoe
ENV PATH=/opt/specmoe/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="specMoE" \
      org.opencontainers.image.description="Tells mixture-of-experts inference servers which experts they will need next." \
      org.opencontainers.image.licenses="Apache-2.0"
USER specmoe
ENTRYPOINT ["specmoe"]

FROM unprivileged AS training
COPY --from=build-training /opt/specmoe /opt/specmoe
# Checkpoints; a volume mounted here takes over that whoever runs the container may write.
USER root
RUN install --directory --mode 1777 /runs
USER specmoe
WORKDIR /runs
CMD ["train", "--help"]

FROM unprivileged AS service
COPY --from=build /opt/specmoe /opt/specmoe
# Loopback would be the container's own: which addresses reach it is said by whoever publishes the port.
ENV SPECMOE_HOST=0.0.0.0 SPECMOE_PORT=8080
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['SPECMOE_PORT'] + '/readyz', timeout=2)"]
CMD ["serve"]
