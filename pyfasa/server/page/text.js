// Text of a model as elements: code blocks, `code` and **bold**. All else stays text, and nothing is read as HTML.

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/g;
const FENCE = /^ {0,3}(```|~~~)/;

/** An element with text in it. */
export function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function paragraph(text) {
  const made = element("p");
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    made.append(text.slice(end, found.index));
    made.append(found[1] === undefined ? element("strong", found[2]) : element("code", found[1]));
    end = found.index + found[0].length;
  }
  made.append(text.slice(end));
  return made;
}

/** The blocks of a text, also of one that is still being written. */
export function blocks(text) {
  const made = [];
  let lines = [];
  let fence = null;
  const finish = () => {
    if (fence !== null) {
      const code = element("pre");
      code.tabIndex = 0; // so that the keyboard can scroll it
      code.append(element("code", lines.join("\n")));
      made.push(code);
    } else {
      const parts = lines.join("\n").split(/\n{2,}/).filter((part) => part.trim());
      made.push(...parts.map((part) => paragraph(part.replace(/^\n+|\n+$/g, ""))));
    }
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = line.match(FENCE)?.[1];
    if (mark && (fence === null || mark === fence)) {
      finish();
      fence = fence === null ? mark : null;
    } else {
      lines.push(line);
    }
  }
  if (fence !== null || lines.length) finish();
  return made;
}
