"""Published results, one YAML file each; `conf.recipes` reads them, `python -m recipes` lists them."""
