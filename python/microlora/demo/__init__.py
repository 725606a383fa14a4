"""Personalised code search over the standard library: the corpus, the measure and the experiment."""
