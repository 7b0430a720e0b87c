# The backend to try a tunnel with: httpbin under gunicorn.

ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
RUN python3 -m venv /opt/httpbin
RUN /opt/httpbin/bin/pip install --no-cache-dir 'httpbin>=0.10.4,<1' 'gunicorn>=27,<28'

FROM ${BASE}
COPY --from=build /opt/httpbin /opt/httpbin
COPY compose/health.py /opt/httpbin/
ENV PATH=/opt/httpbin/bin:$PATH
EXPOSE 8000/tcp
USER 10002:10002
HEALTHCHECK --interval=5s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "/opt/httpbin/health.py", "http://127.0.0.1:8000/status/200"]
# It keeps idle connections longer (75 s) than the client does (30 s): a request never meets one that is just closing.
CMD ["gunicorn", "--bind=0.0.0.0:8000", "--workers=2", "--worker-class=gthread", "--threads=64", "--keep-alive=75", \
    "--worker-tmp-dir=/dev/shm", "--no-control-socket", "httpbin:app"]
