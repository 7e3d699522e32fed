"""Evaluation: the glyph classifier, metrics and the evaluator that tabulates them."""
