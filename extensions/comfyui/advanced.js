// Folds the advanced settings of our nodes on the canvas, as Nodes 2.0 does; "Show Advanced" is in the node's menu.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "retort.advanced",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Retort") || !node.isWidgetVisible || !node.getLayoutWidgets) return;
    if (!node.widgets?.some((widget) => widget.options?.advanced)) return;
    const { isWidgetVisible, getLayoutWidgets } = node;
    // A method's settings come and go with the choice, so they are marked whenever they are looked at.
    node.isWidgetVisible = function (widget) {
      if (widget.options?.advanced) widget.advanced = true;
      return isWidgetVisible.call(this, widget);
    };
    // Without this the canvas keeps room for what it does not draw.
    node.getLayoutWidgets = function () {
      return getLayoutWidgets.call(this).filter((widget) => !widget.advanced || this.showAdvanced);
    };
    node.showAdvanced ??= Boolean(app.extensionManager.setting.get("Comfy.Node.AlwaysShowAdvancedWidgets"));
    node.setSize([node.size[0], node.computeSize()[1]]);
  },
});
