"""`python -m recipes` prints the table of recipes, `python -m recipes --write` writes it: models/recipe_tables.py."""

import sys

from models.recipe_tables import main

if __name__ == "__main__":
    main(sys.argv[1:])
