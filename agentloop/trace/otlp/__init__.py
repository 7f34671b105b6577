"""The exporter `otlp`: spans to any OpenTelemetry receiver, as OTLP over HTTP in protobuf."""

from agentloop.trace.otlp.exporter import OtlpExporter

__all__ = ["OtlpExporter"]
