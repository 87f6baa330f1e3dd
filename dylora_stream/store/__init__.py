"""What lasts: learn's DuckDB file, the FAISS index, and expert folders under content addresses."""
