"""Damage: to images, to texts, to feature views, each seeded per sample, and the one list of conditions."""
