"""Operations on arrays: attention, key scores, selection of the best."""
