"""Bytes and brokers: the wire format, kafka-python behind the ports, and brokers that are started here."""
