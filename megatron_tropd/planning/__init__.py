"""Memory and seconds of a recipe before it runs, and layouts that fit."""
