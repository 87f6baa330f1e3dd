"""DyLoRA Stream: a language model behind a Kafka topic that grows a LoRA expert for each new kind of record."""

__version__ = "0.1.0"
