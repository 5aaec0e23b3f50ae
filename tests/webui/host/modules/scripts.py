"""Script and AlwaysVisible."""

AlwaysVisible = object()


class Script:
    infotext_fields = None
    is_img2img = False

    def elem_id(self, item_id):
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{self.title().lower()}_{item_id}"
