"""Beyond detectron2's DefaultTrainer: what the entry scripts need."""
