"""`abkd cache`: a recipe's teacher writes its targets down. `options` says what, `texts` and `pictures` of what."""
