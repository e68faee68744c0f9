"""What quantisation configs say of single modules: one file a format, nothing judged."""
