"""Results for people: terminal views, HTML pages, files that appear whole."""
