"""The study: what each method is worth, by a protocol written down before the runs."""
