// Browsers refuse workers to pages that are opened as files. There, the worker of the search box runs in a hidden iframe.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    window.addEventListener("message", (event) => {
      if (event.source === this.frame.contentWindow) {
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      }
    });
    const inside = this.frame.contentDocument;
    inside.open();
    inside.write(
      `<body><script>
        postMessage = (data) => parent.postMessage(data, "*");
        importScripts = async (...urls) => {
          for (const url of urls) {
            await new Promise((resolve) => {
              const script = document.createElement("script");
              script.src = url;
              script.onload = resolve;
              document.body.append(script);
            });
          }
        };
      <\/script><script src="${url}"><\/script></body>`,
    );
    inside.close();
    // After open(), which removes listeners.
    this.loaded = new Promise((resolve) => {
      this.frame.contentWindow.addEventListener("load", resolve);
    });
  }

  postMessage(data) {
    const send = () => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    this.loaded.then(send);
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
