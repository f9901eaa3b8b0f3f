"""The paper's comparisons: what is trained for each, and the report on what came out."""
