"""Folders in the trainers' layout: from the official releases, or made up."""
