"""Operations and memory of the models, counted from shapes alone."""
