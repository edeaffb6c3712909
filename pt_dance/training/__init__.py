"""From topics, qrels and mined negatives to a trained encoder and its refreshed index."""
