"""Results for people: terminal output, plots, HTML pages."""
