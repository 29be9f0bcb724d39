"""Results as words, figures and pages."""
