"""Files, processes, signals and the hub: what knows neither an SAE nor a language model."""
