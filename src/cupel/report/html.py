def write_page(card, path):
    path.write_text("x")
