"""Stage two: heads on kept embeddings, judged on slides they have not seen."""
