"""Plans whether a model and a prompt fit on given devices, from programs that are compiled but never run."""
