"""The paper's tables: their rows as configs, run and set beside the paper's figures."""
