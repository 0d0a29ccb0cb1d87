"""Rank selection: curves of what a rank costs and loses, and solvers from them to
ranks."""
