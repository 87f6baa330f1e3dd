"""The one place that constructs: settings in, wired roles and tools out."""

from dylora_stream.bootstrap.measuring import serve_through, tiny_model, zero_experts
from dylora_stream.bootstrap.parts import (
    SystemClock,
    create_topics,
    fetch_model,
    load_backbone,
    mixture_answerer,
    model_path,
    settings_within,
)
from dylora_stream.bootstrap.roles import child, learn, serve, supervise
from dylora_stream.bootstrap.traffic import (
    Heard,
    ResultData,
    Traffic,
    backbone_alone,
    demo_broker,
    read_positions,
    trained_rows,
)

__all__ = [
    "Heard", "ResultData", "SystemClock", "Traffic", "backbone_alone", "child", "create_topics", "demo_broker",
    "fetch_model", "learn", "load_backbone", "mixture_answerer", "model_path", "read_positions", "serve",
    "serve_through", "settings_within", "supervise", "tiny_model", "trained_rows", "zero_experts",
]  # fmt: skip
