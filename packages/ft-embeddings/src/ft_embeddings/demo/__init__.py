"""`ft demo`: the main job on a corpus that ships with the pack, start to finish."""
