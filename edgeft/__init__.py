"""edgeft: from a LoRA adapter to measured edge artefacts, a router and the bill."""

__version__ = "0.1.0"
