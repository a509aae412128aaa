"use strict";
// Texts come from strangers. They become text nodes and attributes named in our own templates, never HTML.
{
  const POLL_MS = 2000;
  const ANSWERS_AT_ONCE = 4; // a browser opens six connections to one origin
  const EVENT_CHARACTERS = 1 << 20;

  const root = document.documentElement;
  const find = (selector, within = document) => within.querySelector(selector);

  // Theme: before anything is drawn, so that nothing flashes.
  const THEMES = ["system", "light", "dark"];
  let theme = "system";
  try {
    theme = localStorage.getItem("theme") ?? theme;
  } catch {} // storage may be forbidden
  const applyTheme = () => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };
  applyTheme();
  root.classList.add("script");

  function startTheme() {
    const button = find("#theme");
    const name = () => (find("span", button).textContent = root.dataset.theme ?? "system");
    name();
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
      applyTheme();
      name();
      try {
        localStorage.setItem("theme", theme);
      } catch {}
    });
  }

  // Tables: the server's own rows, kept up to date.
  function fill(element, texts) {
    for (const slot of element.querySelectorAll("[data-field]")) {
      const text = texts[slot.dataset.field];
      if (text === undefined) continue;
      if (Array.isArray(text)) fillList(slot, text);
      else if (slot.textContent !== text) slot.textContent = text;
    }
    for (const slot of [element, ...element.querySelectorAll("[data-set]")]) {
      for (const pair of (slot.dataset.set ?? "").split(" ").filter(Boolean)) {
        const [attribute, field] = pair.split("=");
        if (slot.getAttribute(attribute) !== texts[field]) slot.setAttribute(attribute, texts[field]);
      }
    }
  }

  function fillList(list, texts) {
    const same = list.children.length === texts.length;
    if (same && texts.every((text, index) => list.children[index].textContent === text)) return;
    list.replaceChildren(
      ...texts.map((text) => {
        const item = document.createElement("li");
        item.textContent = text;
        return item;
      }),
    );
  }

  function fromTemplate(name) {
    return find(`#${name}-template`).content.firstElementChild.cloneNode(true);
  }

  function sync(kind, lines) {
    const body = find(`#${kind}-rows`);
    const rows = new Map([...body.children].map((row) => [row.dataset.key, row]));
    lines.forEach((line, place) => {
      const row = rows.get(line.key) ?? fromTemplate(kind);
      rows.delete(line.key);
      row.dataset.key = line.key;
      fill(row, line);
      if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
    });
    // What a person has chosen stays, and says by itself that it is gone when it is asked.
    for (const row of rows.values()) if (!find(":checked", row)) row.remove();
  }

  async function copy(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    // A page without https has only the old way.
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    if (!copied) throw new Error("the browser does not copy");
  }

  function startCopying() {
    document.addEventListener("click", async ({ target }) => {
      if (!target.matches("button.copy")) return;
      target.textContent = await copy(target.value).then(() => "Copied", () => "Failed");
      target.focus();
      setTimeout(() => (target.textContent = "Copy"), 2000);
    });
  }

  // Plots.
  const compact = (value) => (value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
  const bytes = (value) => {
    const power = value < 1e3 ? 0 : value < 1e6 ? 1 : 2;
    return `${compact(value / 1e3 ** power)} ${["B", "kB", "MB"][power]}/s`;
  };
  const SERIES = {
    requests: { floor: 1, show: (value) => `${compact(value)}/s` },
    in_flight: { floor: 1, show: compact },
    bytes: { floor: 1000, show: bytes },
  };

  /** The next of 1, 2, 5, 10, 20, ... */
  function ceiling(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.999999);
  }

  function draw(figure, values) {
    const { floor, show } = SERIES[figure.dataset.series];
    const most = Math.max(...values);
    const top = ceiling(Math.max(most, floor));
    const points = values.map(
      (value, index) =>
        `${((index * 300) / (values.length - 1)).toFixed(1)},${(79 - (78 * value) / top).toFixed(1)}`,
    );
    find(".line", figure).setAttribute("d", `M${points.join("L")}`);
    find(".area", figure).setAttribute("d", `M0,80L${points.join("L")}L300,80Z`);
    const now = show(values.at(-1));
    find(".last", figure).textContent = now;
    find(".most", figure).textContent = show(top);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const title = find("figcaption", figure).textContent;
    find("svg", figure).setAttribute(
      "aria-label",
      `${title}, the last five minutes: now ${now}, at most ${show(most)}, ${show(mean)} on average`,
    );
  }

  async function poll() {
    if (!document.hidden) {
      try {
        const answer = await fetch("dashboard/data", { signal: AbortSignal.timeout(10_000) });
        if (!answer.ok) throw new Error(`it answered ${answer.status}`);
        const data = await answer.json();
        fill(find("#lead"), data);
        sync("node", data.nodes);
        sync("adapter", data.adapters);
        sync("choice", data.choices);
        for (const figure of document.querySelectorAll("[data-series]")) {
          draw(figure, data.series[figure.dataset.series]);
        }
        say("#notice", data.notice);
      } catch (error) {
        say("#notice", `The router can't be reached now (${error.message}). This is what it said last.`);
      }
    }
    setTimeout(poll, POLL_MS);
  }

  function say(where, text) {
    const place = find(where);
    if (place.textContent !== text) place.textContent = text;
  }

  // Playground.
  async function* events(body, comment) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let data = [];
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        if (rest.length > EVENT_CHARACTERS) throw new Error("an event without an end came");
        for (const line of lines.map((it) => it.replace(/\r$/, ""))) {
          if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
          else if (line.startsWith(":")) comment(line.slice(1).trim());
          else if (line === "" && data.length) {
            yield data.join("\n");
            data = [];
          }
        }
      }
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  async function refusal(answer) {
    const text = await answer.text();
    try {
      const { message, hint } = JSON.parse(text).error;
      return [message, hint].filter(Boolean).join(". ");
    } catch {
      return `${answer.status} ${text.slice(0, 500)}`;
    }
  }

  function origin(headers) {
    const [node, fallback, model] = ["node", "fallback", "fallback-model"].map((name) =>
      headers.get(`x-r3mes-${name}`),
    );
    if (!fallback) return `from ${node ?? "a node"}`;
    return `not from the network: from ${[fallback, model].filter(Boolean).join(", ")}`;
  }

  /** Stream one answer into a card of its own; gives how it ended. */
  async function answer(model, body, headers, signal) {
    const card = fromTemplate("answer");
    fill(card, { model });
    find("#answers").append(card);
    const words = document.createTextNode("");
    find(".text", card).append(words);
    const asked = performance.now();
    let first;
    let tokens = 0;
    let ended = false;
    const figures = () => {
      const seconds = (performance.now() - first) / 1000;
      const rate = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "–";
      fill(card, { tokens: String(tokens), rate });
    };
    const comment = (text) => {
      const nodes = text.match(/^x-r3mes-nodes: (.*)$/)?.[1];
      if (nodes) fill(card, { from: `from ${nodes}` });
    };
    try {
      const request = { method: "POST", headers, body: JSON.stringify({ model, ...body }), signal };
      const response = await fetch("v1/chat/completions", request);
      if (!response.ok) throw new Error(await refusal(response));
      fill(card, { from: origin(response.headers) });
      for await (const event of events(response.body, comment)) {
        if (event === "[DONE]") {
          ended = true;
          continue;
        }
        const piece = JSON.parse(event);
        if (piece.error) throw new Error(piece.error.message ?? "the node failed");
        const content = piece.choices?.[0]?.delta?.content;
        if (content) {
          if (first === undefined) {
            first = performance.now();
            fill(card, { first: `${Math.round(first - asked)} ms` });
          }
          words.appendData(String(content));
          tokens += 1;
          figures();
        }
        if (piece.usage) {
          tokens = piece.usage.completion_tokens;
          if (first !== undefined) figures();
        }
      }
      if (!ended) throw new Error("the answer broke off before its end");
      return tokens === 1 ? "1 token" : `${tokens} tokens`;
    } catch (error) {
      if (signal.aborted) {
        fill(card, { error: "Stopped." });
        return "stopped";
      }
      fill(card, { error: `Error: ${error.message}` });
      return "failed";
    } finally {
      card.setAttribute("aria-busy", "false");
    }
  }

  function startPlayground() {
    const form = find("#ask");
    const [submit, stop] = [find("[type=submit]", form), find("#stop")];
    const chosen = () => [...form.querySelectorAll("[name=model]:checked")];
    let running = null;

    for (const box of [...form.querySelectorAll("[name=model]")].slice(0, 2)) box.checked = true;
    form.addEventListener("change", ({ target }) => {
      if (target.name !== "model" || chosen().length <= ANSWERS_AT_ONCE) return;
      target.checked = false;
      say("#progress", `At most ${ANSWERS_AT_ONCE} answer at a time.`);
    });
    find("#prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      form.requestSubmit();
    });
    stop.addEventListener("click", () => running?.abort());
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const models = chosen().map((box) => box.value);
      if (running) return;
      if (!models.length) return say("#progress", "Choose who answers.");
      const { prompt, max_tokens, temperature, key } = form.elements;
      const body = {
        messages: [{ role: "user", content: prompt.value }],
        max_tokens: Number(max_tokens.value),
        temperature: Number(temperature.value),
        stream: true,
        stream_options: { include_usage: true },
      };
      const headers = { "Content-Type": "application/json" };
      if (key.value) headers.Authorization = `Bearer ${key.value}`;
      running = new AbortController();
      stop.disabled = false;
      submit.setAttribute("aria-disabled", "true");
      find("#answers").replaceChildren();
      say("#progress", `${models.join(" and ")}: answering`);
      const ends = await Promise.all(
        models.map((model) => answer(model, body, headers, running.signal)),
      );
      running = null;
      submit.removeAttribute("aria-disabled");
      if (document.activeElement === stop) submit.focus();
      stop.disabled = true;
      say("#progress", models.map((model, index) => `${model}: ${ends[index]}`).join(". "));
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    startTheme();
    startCopying();
    startPlayground();
    poll();
  });
}
