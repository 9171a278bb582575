"""What the serve_* benchmarks share: stand-in upstreams, the rivals, load, and tables."""
