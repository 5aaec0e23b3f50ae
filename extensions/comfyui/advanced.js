// Folds the advanced settings of our nodes on the canvas, as Nodes 2.0 does; "Show Advanced" is in the node's menu.
import { app } from "../../scripts/app.js";

function mark(widget) {
  if (widget.options?.advanced) widget.advanced = true;
}

app.registerExtension({
  name: "retort.advanced",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Retort") || !node.isWidgetVisible || !node.getLayoutWidgets) return;
    if (!node.widgets?.some((widget) => widget.options?.advanced)) return;
    const { getLayoutWidgets } = node;
    // A method's settings come and go with the choice, so they are marked whenever they are looked at: frontends from
    // 1.58 measure and draw what has a row, and ask what is visible only where the pointer is.
    for (const name of ["isWidgetVisible", "isWidgetRowVisible"]) {
      const look = node[name];
      if (!look) continue;
      node[name] = function (widget) {
        mark(widget);
        return look.call(this, widget);
      };
    }
    // Without this the canvas keeps room for what it does not draw.
    node.getLayoutWidgets = function () {
      this.widgets?.forEach(mark);
      return getLayoutWidgets.call(this).filter((widget) => !widget.advanced || this.showAdvanced);
    };
    node.showAdvanced ??= Boolean(app.extensionManager.setting.get("Comfy.Node.AlwaysShowAdvancedWidgets"));
    node.setSize([node.size[0], node.computeSize()[1]]);
  },
});
