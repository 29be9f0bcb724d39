"""The room parts."""
