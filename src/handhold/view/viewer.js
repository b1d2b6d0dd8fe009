// The report's 3D viewer: plain WebGL2, no dependencies. World axes are OpenCV's (x right, y down, z forward), metres.
(() => {
"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("scene-data").textContent);
const F = data.frames.length;

// ---- small maths: matrices are row-major arrays of 16 ----
const mul = (a, b) => {
  const out = new Array(16).fill(0);
  for (let i = 0; i < 4; i++) for (let j = 0; j < 4; j++) for (let k = 0; k < 4; k++) out[4 * i + j] += a[4 * i + k] * b[4 * k + j];
  return out;
};
const identity = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1];
const inverseRigid = (m) => {
  const r = [m[0], m[4], m[8], m[1], m[5], m[9], m[2], m[6], m[10]], t = [m[3], m[7], m[11]];
  const s = [0, 1, 2].map((i) => -(r[3 * i] * t[0] + r[3 * i + 1] * t[1] + r[3 * i + 2] * t[2]));
  return [r[0], r[1], r[2], s[0], r[3], r[4], r[5], s[1], r[6], r[7], r[8], s[2], 0, 0, 0, 1];
};
const projection = (fx, fy, cx, cy, w, h, near, far) => [
  2 * fx / w, 0, 2 * cx / w - 1, 0,
  0, -2 * fy / h, 1 - 2 * cy / h, 0,
  0, 0, (far + near) / (far - near), -2 * far * near / (far - near),
  0, 0, 1, 0];
const bytes = (text) => {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out.buffer;
};

// ---- state ----
const state = {
  frame: data.start, playing: false, camera: false, flat: false, skeleton: false, unseen: false, grid: true,
  backdrop: true, opacity: 0.9, azimuth: 0.6, elevation: 0.3, distance: data.radius * 4.2, target: data.centre.slice(),
};
const hidden = new Set();
let dirty = true;
const redraw = () => { dirty = true; };

// ---- WebGL ----
const canvas = $("canvas"), stage = $("stage"), backdrop = $("backdrop");
const gl = canvas.getContext("webgl2", { antialias: true, alpha: true, premultipliedAlpha: true, preserveDrawingBuffer: true });

function program(vertex, fragment) {
  const p = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const s = gl.createShader(kind);
    gl.shaderSource(s, "#version 300 es\nprecision highp float;\n" + text);
    gl.compileShader(s);
    if (!gl.getShaderParameter(s, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(s));
    gl.attachShader(p, s);
  }
  ["position", "normal", "color"].forEach((name, i) => gl.bindAttribLocation(p, i, name));
  gl.linkProgram(p);
  const at = {};
  for (let i = 0; i < gl.getProgramParameter(p, gl.ACTIVE_UNIFORMS); i++) {
    const name = gl.getActiveUniform(p, i).name;
    at[name] = gl.getUniformLocation(p, name);
  }
  return { p, at };
}
const buffer = (values, target = gl.ARRAY_BUFFER, usage = gl.STATIC_DRAW) => {
  const b = gl.createBuffer();
  gl.bindBuffer(target, b);
  gl.bufferData(target, values, usage);
  return b;
};
function normalsOf(vertices, faces, out) {
  out.fill(0);
  for (let i = 0; i < faces.length; i += 3) {
    const a = 3 * faces[i], b = 3 * faces[i + 1], c = 3 * faces[i + 2];
    const ux = vertices[b] - vertices[a], uy = vertices[b + 1] - vertices[a + 1], uz = vertices[b + 2] - vertices[a + 2];
    const vx = vertices[c] - vertices[a], vy = vertices[c + 1] - vertices[a + 1], vz = vertices[c + 2] - vertices[a + 2];
    const x = uy * vz - uz * vy, y = uz * vx - ux * vz, z = ux * vy - uy * vx;
    for (const k of [a, b, c]) { out[k] += x; out[k + 1] += y; out[k + 2] += z; }
  }
  return out;  // area-weighted; the shader normalises
}

function start() {
  const surface = program(
    `in vec3 position, normal; in vec4 color;
     uniform mat4 model, view, proj; out vec3 p, n; out vec4 c;
     void main() { vec4 q = view * model * vec4(position, 1.0); p = q.xyz; n = mat3(view) * mat3(model) * normal; c = color; gl_Position = proj * q; }`,
    `in vec3 p, n; in vec4 c; out vec4 result;
     uniform bool flatShade, ghost, unseen;
     void main() {
       if (ghost && ((int(gl_FragCoord.x) / 2 + int(gl_FragCoord.y) / 2) & 1) == 1) discard;
       vec3 m = flatShade || dot(n, n) < 1e-30 ? cross(dFdx(p), dFdy(p)) : n;
       m = normalize(m);
       vec3 eye = -normalize(p);
       if (dot(m, eye) < 0.0) m = -m;
       vec3 key = normalize(vec3(-0.45, -0.75, -0.75));
       float diffuse = 0.40 + 0.46 * max(dot(m, key), 0.0) + 0.20 * dot(m, eye);
       float shine = pow(max(dot(m, normalize(key + eye)), 0.0), 28.0);
       vec3 base = c.rgb;
       if (unseen && c.a < 0.5) base = mix(base, vec3(0.36, 0.52, 0.95), 0.75);
       if (ghost) base = mix(base, vec3(dot(base, vec3(0.3, 0.6, 0.1))), 0.7);
       result = vec4(base * diffuse + 0.06 * shine, 1.0);
     }`);
  const lines = program(
    `in vec3 position; in vec4 color; uniform mat4 view, proj; uniform float size; out vec4 c;
     void main() { gl_Position = proj * view * vec4(position, 1.0); gl_PointSize = size; c = color; }`,
    `in vec4 c; out vec4 result; void main() { result = vec4(c.rgb * c.a, c.a); }`);

  for (const body of data.bodies) {
    const faces = new Uint32Array(bytes(body.faces));
    body.indices = faces;
    body.count = faces.length;
    body.index = buffer(faces, gl.ELEMENT_ARRAY_BUFFER);
    if (body.kind === "hand") {
      body.packed = new Uint16Array(bytes(body.vertices));
      body.points = new Float32Array(3 * body.size);
      body.normals = new Float32Array(3 * body.size);
      body.jointPoints = new Float32Array(bytes(body.joints));
      body.shown = -1;
      body.position = buffer(body.points, gl.ARRAY_BUFFER, gl.DYNAMIC_DRAW);
      body.normal = buffer(body.normals, gl.ARRAY_BUFFER, gl.DYNAMIC_DRAW);
    } else {
      body.points = new Float32Array(bytes(body.vertices));
      body.poses = new Float32Array(bytes(body.poses));
      body.position = buffer(body.points);
      body.normal = buffer(normalsOf(body.points, faces, new Float32Array(body.points.length)));
    }
    if (body.colors) body.colors = buffer(new Uint8Array(bytes(body.colors)));
  }
  function unpack(body, frame) {
    if (body.shown === frame) return;
    body.shown = frame;
    const n = 3 * body.size, base = n * frame;
    for (let i = 0; i < n; i++) body.points[i] = body.low[i % 3] + body.packed[base + i] * body.step[i % 3];
    normalsOf(body.points, body.indices, body.normals);
    gl.bindBuffer(gl.ARRAY_BUFFER, body.position); gl.bufferSubData(gl.ARRAY_BUFFER, 0, body.points);
    gl.bindBuffer(gl.ARRAY_BUFFER, body.normal); gl.bufferSubData(gl.ARRAY_BUFFER, 0, body.normals);
  }
  const lineBuffer = gl.createBuffer(), lineColors = gl.createBuffer();
  function drawLines(points, colors, view, proj, dots = 0) {
    gl.useProgram(lines.p);
    gl.uniformMatrix4fv(lines.at.view, true, view);
    gl.uniformMatrix4fv(lines.at.proj, true, proj);
    gl.bindBuffer(gl.ARRAY_BUFFER, lineBuffer); gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(points), gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(0); gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
    gl.bindBuffer(gl.ARRAY_BUFFER, lineColors); gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(colors), gl.DYNAMIC_DRAW);
    gl.disableVertexAttribArray(1);
    gl.enableVertexAttribArray(2); gl.vertexAttribPointer(2, 4, gl.FLOAT, false, 0, 0);
    gl.uniform1f(lines.at.size, dots);
    gl.drawArrays(gl.LINES, 0, points.length / 3);
    if (dots) gl.drawArrays(gl.POINTS, 0, points.length / 3);
  }
  const grid = { points: [], colors: [] };
  {
    const step = 0.05, n = Math.max(6, Math.ceil(2.2 * data.radius / step)), reach = n * step;
    const [x0, , z0] = data.centre, y = data.floor;
    const fade = (u, v) => 0.22 * Math.max(0, 1 - Math.hypot(u, v) / reach);
    for (let i = -n; i <= n; i++) for (let j = -n; j < n; j++) {
      const a = i * step, b = j * step, c = b + step;
      for (const [u, v] of [[a, b], [a, c]]) { grid.points.push(x0 + u, y, z0 + v); grid.colors.push(1, 1, 1, fade(u, v)); }
      for (const [u, v] of [[b, a], [c, a]]) { grid.points.push(x0 + u, y, z0 + v); grid.colors.push(1, 1, 1, fade(u, v)); }
    }
  }
  function frustum(frame) {
    const m = data.worldFromCam[data.worldFromCam.length === 1 ? 0 : frame], [w, h] = data.size, depth = 0.35 * data.radius;
    const at = (x, y, z) => [0, 1, 2].map((i) => m[4 * i] * x + m[4 * i + 1] * y + m[4 * i + 2] * z + m[4 * i + 3]);
    const corner = (u, v) => at((u - data.K[2]) / data.K[0] * depth, (v - data.K[3]) / data.K[1] * depth, depth);
    const o = at(0, 0, 0), q = [corner(0, 0), corner(w, 0), corner(w, h), corner(0, h)], points = [], colors = [];
    for (let i = 0; i < 4; i++) for (const p of [o, q[i], q[i], q[(i + 1) % 4]]) { points.push(...p); colors.push(0.95, 0.8, 0.45, 0.55); }
    return [points, colors];
  }
  const bones = [];
  for (let f = 0; f < 5; f++) for (let k = 0; k < 4; k++) bones.push([k ? 4 * f + k : 0, 4 * f + k + 1]);

  function cameraMatrices(width, height) {
    const far = 20 * data.radius + 20;
    if (state.camera) {
      const m = data.worldFromCam[data.worldFromCam.length === 1 ? 0 : state.frame], [w, h] = data.size, [fx, fy, cx, cy] = data.K;
      const s = Math.min(width / w, height / h);
      gl.viewport(Math.round((width - s * w) / 2), Math.round((height - s * h) / 2), Math.round(s * w), Math.round(s * h));
      return [inverseRigid(m), projection(fx, fy, cx, cy, w, h, 0.01, far)];
    }
    gl.viewport(0, 0, width, height);
    const ca = Math.cos(state.azimuth), sa = Math.sin(state.azimuth), ce = Math.cos(state.elevation), se = Math.sin(state.elevation);
    const r = [ca, 0, -sa, -se * sa, ce, -se * ca, ce * sa, se, ce * ca];  // rows: right, down, forward; above is -y
    const t = state.target, view = [
      r[0], r[1], r[2], -(r[0] * t[0] + r[1] * t[1] + r[2] * t[2]),
      r[3], r[4], r[5], -(r[3] * t[0] + r[4] * t[1] + r[5] * t[2]),
      r[6], r[7], r[8], -(r[6] * t[0] + r[7] * t[1] + r[8] * t[2]) + state.distance,
      0, 0, 0, 1];
    state.axes = r;
    const focal = 1.5 * Math.min(width, height);
    return [view, projection(focal, focal, width / 2, height / 2, width, height, 0.01 * state.distance, far + state.distance)];
  }
  function draw() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(1, Math.round(stage.clientWidth * ratio)), height = Math.max(1, Math.round(stage.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    const overVideo = state.camera && state.backdrop && data.images.length > 0;
    backdrop.style.display = overVideo ? "block" : "none";
    if (overVideo && backdrop.dataset.frame !== String(state.frame)) {
      backdrop.src = data.images[state.frame]; backdrop.dataset.frame = String(state.frame);
    }
    canvas.style.opacity = overVideo ? state.opacity : 1;
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.disable(gl.BLEND);
    const [view, proj] = cameraMatrices(width, height);
    gl.useProgram(surface.p);
    gl.uniformMatrix4fv(surface.at.view, true, view);
    gl.uniformMatrix4fv(surface.at.proj, true, proj);
    gl.uniform1i(surface.at.flatShade, state.flat);
    gl.uniform1i(surface.at.unseen, state.unseen);
    for (const body of data.bodies) {
      if (hidden.has(body.name) || (state.skeleton && body.kind === "hand")) continue;
      if (body.kind === "hand") unpack(body, state.frame);
      gl.uniformMatrix4fv(surface.at.model, true, body.kind === "hand" ? identity : body.poses.subarray(16 * state.frame, 16 * state.frame + 16));
      gl.uniform1i(surface.at.ghost, !body.valid[state.frame]);
      gl.bindBuffer(gl.ARRAY_BUFFER, body.position); gl.enableVertexAttribArray(0); gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
      gl.bindBuffer(gl.ARRAY_BUFFER, body.normal); gl.enableVertexAttribArray(1); gl.vertexAttribPointer(1, 3, gl.FLOAT, false, 0, 0);
      if (body.colors) {
        gl.bindBuffer(gl.ARRAY_BUFFER, body.colors); gl.enableVertexAttribArray(2); gl.vertexAttribPointer(2, 4, gl.UNSIGNED_BYTE, true, 0, 0);
      } else {
        gl.disableVertexAttribArray(2); gl.vertexAttrib4f(2, body.color[0] / 255, body.color[1] / 255, body.color[2] / 255, 1);
      }
      gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, body.index);
      gl.drawElements(gl.TRIANGLES, body.count, gl.UNSIGNED_INT, 0);
    }
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    if (!state.camera && state.grid) {
      drawLines(grid.points, grid.colors, view, proj);
      drawLines(...frustum(state.frame), view, proj);
    }
    if (state.skeleton) {
      gl.disable(gl.DEPTH_TEST);
      for (const body of data.bodies) {
        if (body.kind !== "hand" || hidden.has(body.name)) continue;
        const points = [], colors = [], alpha = body.valid[state.frame] ? 1 : 0.35;
        for (const pair of bones) for (const j of pair) {
          const at = 3 * (21 * state.frame + j);
          points.push(body.jointPoints[at], body.jointPoints[at + 1], body.jointPoints[at + 2]);
          colors.push(body.color[0] / 255, body.color[1] / 255, body.color[2] / 255, alpha);
        }
        drawLines(points, colors, view, proj, 5 * (window.devicePixelRatio || 1));
      }
    }
  }

  // ---- pointer: one finger or left button turns, two fingers or right button pans, pinch or wheel zooms ----
  const pointers = new Map();
  const pan = (dx, dy) => {
    const k = state.distance / (1.5 * Math.min(stage.clientWidth, stage.clientHeight)), r = state.axes;
    for (let i = 0; i < 3; i++) state.target[i] -= k * (dx * r[i] + dy * r[3 + i]);
  };
  const zoom = (factor) => { state.distance = Math.min(Math.max(state.distance * factor, 0.3 * data.radius), 30 * data.radius); };
  canvas.addEventListener("contextmenu", (e) => e.preventDefault());
  canvas.addEventListener("pointerdown", (e) => { canvas.setPointerCapture(e.pointerId); pointers.set(e.pointerId, [e.clientX, e.clientY]); });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (e) => pointers.delete(e.pointerId));
  canvas.addEventListener("pointermove", (e) => {
    if (!pointers.has(e.pointerId)) return;
    const before = [...pointers.values()].map((p) => p.slice()), [x, y] = pointers.get(e.pointerId);
    pointers.set(e.pointerId, [e.clientX, e.clientY]);
    if (state.camera) return;
    const after = [...pointers.values()], dx = e.clientX - x, dy = e.clientY - y;
    if (after.length >= 2) {
      const gap = (q) => Math.hypot(q[0][0] - q[1][0], q[0][1] - q[1][1]);
      zoom(gap(before) / Math.max(gap(after), 1));
      pan(dx / 2, dy / 2);
    } else if (e.buttons & 2 || e.buttons & 4 || e.shiftKey) pan(dx, dy);
    else {
      state.azimuth += 0.008 * dx;
      state.elevation = Math.min(Math.max(state.elevation + 0.008 * dy, -1.5), 1.5);
    }
    redraw();
  });
  canvas.addEventListener("wheel", (e) => {
    if (state.camera) return;
    e.preventDefault(); zoom(Math.exp(0.0012 * e.deltaY * (e.deltaMode ? 16 : 1))); redraw();
  }, { passive: false });
  canvas.addEventListener("dblclick", () => { Object.assign(state, { azimuth: 0.6, elevation: 0.3, distance: 4.2 * data.radius, target: data.centre.slice() }); redraw(); });

  // ---- controls ----
  const slider = $("time"), play = $("play");
  slider.max = F - 1;
  function show(frame) {
    state.frame = ((frame % F) + F) % F;
    slider.value = state.frame;
    $("clock").textContent = `${state.frame + 1} / ${F}`;
    const source = data.frames[state.frame];
    $("now").textContent = data.bodies.map((b) => `${b.label}: ${b.valid[state.frame] ? Math.round(100 * b.confidence[state.frame]) + " %" : "not valid"}${b.reason[state.frame] ? ", " + b.reason[state.frame] : ""}`).join("  ·  ") || "nothing was reconstructed";
    $("which").textContent = `frame ${source}`;
    for (const head of document.querySelectorAll(".playhead")) head.style.left = `${100 * (data.rows[state.frame] + 0.5) / data.total}%`;
    for (const thumb of document.querySelectorAll(".thumb")) thumb.classList.toggle("current", Number(thumb.dataset.frame) === data.rows[state.frame]);
    redraw();
  }
  const nearest = (row) => data.rows.reduce((best, r, i) => Math.abs(r - row) < Math.abs(data.rows[best] - row) ? i : best, 0);
  slider.addEventListener("input", () => show(Number(slider.value)));
  const setPlaying = (on) => { state.playing = on; play.classList.toggle("on", on); play.setAttribute("aria-label", on ? "pause" : "play"); };
  play.addEventListener("click", () => setPlaying(!state.playing));
  const pressed = (id, on) => $(id) && $(id).setAttribute("aria-pressed", String(on));
  function mode(camera) {
    state.camera = camera;
    pressed("orbit", !camera); pressed("camera", camera);
    stage.classList.toggle("in-camera", camera);
    redraw();
  }
  $("orbit").addEventListener("click", () => mode(false));
  $("camera").addEventListener("click", () => mode(true));
  for (const name of ["flat", "skeleton", "unseen", "grid", "backdrop"]) {
    const button = $("toggle-" + name);
    if (button) button.addEventListener("click", () => { state[name] = !state[name]; pressed("toggle-" + name, state[name]); redraw(); });
  }
  for (const button of document.querySelectorAll("[data-body]")) button.addEventListener("click", () => {
    const name = button.dataset.body;
    if (!hidden.delete(name)) hidden.add(name);
    button.setAttribute("aria-pressed", String(!hidden.has(name)));
    redraw();
  });
  $("opacity").addEventListener("input", (e) => { state.opacity = Number(e.target.value); redraw(); });
  for (const thumb of document.querySelectorAll(".thumb")) thumb.addEventListener("click", () => show(nearest(Number(thumb.dataset.frame))));
  for (const strip of document.querySelectorAll(".strip")) {
    const seek = (e) => { const box = strip.getBoundingClientRect(); show(nearest(Math.floor((e.clientX - box.left) / box.width * data.total))); };
    strip.addEventListener("pointerdown", (e) => { setPlaying(false); strip.setPointerCapture(e.pointerId); seek(e); });
    strip.addEventListener("pointermove", (e) => { if (e.buttons) seek(e); });
  }
  document.addEventListener("keydown", (e) => {
    if (e.target.tagName === "INPUT" && e.key !== " ") return;
    if (e.key === " " && e.target.tagName !== "BUTTON") { e.preventDefault(); setPlaying(!state.playing); }
    if (e.key === "ArrowRight") show(state.frame + 1);
    if (e.key === "ArrowLeft") show(state.frame - 1);
  });
  window.addEventListener("resize", redraw);
  canvas.addEventListener("webglcontextlost", () => document.documentElement.classList.add("no-webgl"));

  let last = 0;
  function tick(now) {
    if (state.playing) {
      const steps = Math.floor((now - last) / 1000 * data.fps);
      if (steps > 0) { last += steps * 1000 / data.fps; show(state.frame + steps); }
    } else last = now;
    if (dirty) { dirty = false; draw(); }
    requestAnimationFrame(tick);
  }
  document.documentElement.classList.add("webgl");
  // #camera, #frame=12 and the like, so that a view can be linked to
  const wish = new URLSearchParams(location.hash.slice(1));
  if (wish.has("frame")) state.frame = nearest(Number(wish.get("frame")) || 0);
  for (const name of ["azimuth", "elevation"]) if (wish.has(name)) state[name] = Number(wish.get(name)) || 0;
  for (const name of ["flat", "skeleton", "unseen"]) if (wish.has(name) && $("toggle-" + name)) $("toggle-" + name).click();
  mode(wish.has("camera"));
  show(state.frame);
  tick(0);
}

if (gl) start(); else document.documentElement.classList.add("no-webgl");
})();
