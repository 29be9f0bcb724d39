"""Figures of results, as matplotlib's Figures. They save nothing."""
