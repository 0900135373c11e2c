"""Published config.json files, by the name of the model, for plans of models that are not at hand."""
