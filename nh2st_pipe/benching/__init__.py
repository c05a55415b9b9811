"""Which encoder: a pilot before the whole of a study is embedded."""
