// A tree over triangles, eight children a node, and its C ABI. The walks are in bvh_isa.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

using namespace hh;

namespace {

struct Bvh {
  std::vector<BvhNode> nodes;
  std::vector<BvhDipole> dipoles;
  std::vector<double> triangles;
  std::vector<int64_t> face;
  double centre[3], scale;
  BvhView view() const { return {nodes.data(), dipoles.data(), triangles.data(), face.data(), {centre[0], centre[1], centre[2]}, scale}; }
};

struct Box {
  double lo[3] = {1e300, 1e300, 1e300}, hi[3] = {-1e300, -1e300, -1e300};
  void add(const double* p) {
    for (int k = 0; k < 3; ++k) lo[k] = std::min(lo[k], p[k]), hi[k] = std::max(hi[k], p[k]);
  }
};

// What a cluster of triangles looks like from afar: sums of area normals, their centre of area, first moments about it.
struct Cluster {
  double area = 0, centre[3] = {0, 0, 0}, normal[3] = {0, 0, 0}, moment[3][3] = {}, radius = 0;
};

struct Builder {
  Bvh& tree;
  const double* triangles;  // (n,9), unsorted
  std::vector<int32_t> order;
  std::vector<double> middle;  // (n,3)

  // Halves [b,e) at the median of the widest axis of the triangles' centres: depth is bounded whatever the input.
  int64_t split(int64_t b, int64_t e) {
    Box box;
    for (int64_t i = b; i < e; ++i) box.add(&middle[3 * order[i]]);
    int axis = 0;
    for (int k = 1; k < 3; ++k)
      if (box.hi[k] - box.lo[k] > box.hi[axis] - box.lo[axis]) axis = k;
    const int64_t m = b + (e - b) / 2;
    std::nth_element(order.begin() + b, order.begin() + m, order.begin() + e, [&](int32_t p, int32_t q) {
      const double x = middle[3 * static_cast<int64_t>(p) + axis], y = middle[3 * static_cast<int64_t>(q) + axis];
      return x != y ? x < y : p < q;
    });
    return m;
  }

  void build(int32_t at, int64_t b, int64_t e) {
    int64_t cut[9] = {b, e};
    int parts = 1;
    while (parts < 8 && parts < e - b) {  // cut the largest part again
      int big = 0;
      for (int j = 1; j < parts; ++j)
        if (cut[j + 1] - cut[j] > cut[big + 1] - cut[big]) big = j;
      const int64_t m = split(cut[big], cut[big + 1]);
      for (int j = parts; j > big; --j) cut[j + 1] = cut[j];
      cut[big + 1] = m;
      ++parts;
    }
    BvhNode node = {};
    for (int k = 0; k < 3; ++k)
      for (int j = 0; j < 8; ++j) node.lo[k][j] = 3e18f, node.hi[k][j] = -3e18f;
    node.count = parts;
    for (int j = 0; j < parts; ++j) {
      if (cut[j + 1] - cut[j] == 1) {
        node.child[j] = ~static_cast<int32_t>(cut[j]);
      } else {
        node.child[j] = static_cast<int32_t>(tree.nodes.size());
        tree.nodes.emplace_back();
      }
    }
    tree.nodes[at] = node;
    for (int j = 0; j < parts; ++j)
      if (node.child[j] >= 0) build(node.child[j], cut[j], cut[j + 1]);
  }

  // Boxes and far fields, from the leaves up. Boxes grow by what rounding of a point to float can amount to.
  Box fit(int32_t at, std::vector<int32_t>& under) {
    Box whole;
    for (int j = 0; j < tree.nodes[at].count; ++j) {
      Box box;
      std::vector<int32_t> mine;
      const int32_t child = tree.nodes[at].child[j];
      if (child < 0) {
        for (int c = 0; c < 3; ++c) box.add(&tree.triangles[9 * static_cast<int64_t>(~child) + 3 * c]);
        mine.push_back(~child);
      } else {
        box = fit(child, mine);
      }
      for (int k = 0; k < 3; ++k) {
        tree.nodes[at].lo[k][j] = static_cast<float>(box.lo[k]) - 5e-7f;
        tree.nodes[at].hi[k][j] = static_cast<float>(box.hi[k]) + 5e-7f;
      }
      dipole(tree.dipoles[at], j, mine);
      whole.add(box.lo);
      whole.add(box.hi);
      under.insert(under.end(), mine.begin(), mine.end());
    }
    return whole;
  }

  void dipole(BvhDipole& out, int j, const std::vector<int32_t>& mine) {
    Cluster c;
    std::vector<double> normal(3 * mine.size()), middle_(3 * mine.size());
    for (size_t i = 0; i < mine.size(); ++i) {
      const double* t = &tree.triangles[9 * static_cast<int64_t>(mine[i])];
      double u[3], v[3], *n = &normal[3 * i];
      for (int k = 0; k < 3; ++k) u[k] = t[3 + k] - t[k], v[k] = t[6 + k] - t[k], middle_[3 * i + k] = (t[k] + t[3 + k] + t[6 + k]) / 3;
      for (int k = 0; k < 3; ++k) n[k] = 0.5 * (u[(k + 1) % 3] * v[(k + 2) % 3] - u[(k + 2) % 3] * v[(k + 1) % 3]);
      const double area = std::sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]);
      c.area += area;
      for (int k = 0; k < 3; ++k) c.centre[k] += area * middle_[3 * i + k], c.normal[k] += n[k];
    }
    for (int k = 0; k < 3; ++k)  // no area at all: any centre will do
      c.centre[k] = c.area > 0 ? c.centre[k] / c.area : middle_[k];
    for (size_t i = 0; i < mine.size(); ++i) {
      const double* t = &tree.triangles[9 * static_cast<int64_t>(mine[i])];
      for (int a = 0; a < 3; ++a)
        for (int b = 0; b < 3; ++b) c.moment[a][b] += normal[3 * i + a] * (middle_[3 * i + b] - c.centre[b]);
      for (int corner = 0; corner < 3; ++corner) {
        double r = 0;
        for (int k = 0; k < 3; ++k) r += (t[3 * corner + k] - c.centre[k]) * (t[3 * corner + k] - c.centre[k]);
        c.radius = std::max(c.radius, r);
      }
    }
    for (int k = 0; k < 3; ++k) {
      out.centre[k][j] = static_cast<float>(c.centre[k]);
      out.normal[k][j] = static_cast<float>(c.normal[k]);
      out.moment[k][j] = static_cast<float>(c.moment[k][k]);
    }
    out.moment[3][j] = static_cast<float>(c.moment[0][1] + c.moment[1][0]);
    out.moment[4][j] = static_cast<float>(c.moment[0][2] + c.moment[2][0]);
    out.moment[5][j] = static_cast<float>(c.moment[1][2] + c.moment[2][1]);
    out.radius2[j] = static_cast<float>(c.radius * 1.000001 + 1e-13);
  }
};

}  // namespace

// vertices (n_vertices,3), faces (n_faces,3). Returns null when an index is out of range, a vertex is not finite or there are no faces,
// or when memory runs out.
HH_API void* hh_bvh_build(int64_t n_vertices, int64_t n_faces, const double* vertices, const int64_t* faces) try {
  if (n_faces < 1 || n_faces > (1 << 28) || n_vertices < 1) return nullptr;
  Box box;
  for (int64_t i = 0; i < 3 * n_faces; ++i) {
    if (faces[i] < 0 || faces[i] >= n_vertices) return nullptr;
    const double* p = vertices + 3 * faces[i];
    if (!(std::abs(p[0]) < 1e15 && std::abs(p[1]) < 1e15 && std::abs(p[2]) < 1e15)) return nullptr;
    box.add(p);
  }
  auto tree = std::make_unique<Bvh>();
  double size = 0;
  for (int k = 0; k < 3; ++k) {
    tree->centre[k] = 0.5 * (box.lo[k] + box.hi[k]);
    size = std::max(size, 0.5 * (box.hi[k] - box.lo[k]));
  }
  tree->scale = size > 1e-150 ? 1 / size : 1;  // the mesh fills [-1,1]^3: float errors are relative to its size
  std::vector<double> unsorted(9 * n_faces);
  Builder builder{*tree, unsorted.data(), std::vector<int32_t>(n_faces), std::vector<double>(3 * n_faces)};
  for (int64_t f = 0; f < n_faces; ++f) {
    builder.order[f] = static_cast<int32_t>(f);
    for (int c = 0; c < 3; ++c)
      for (int k = 0; k < 3; ++k) {
        const double x = (vertices[3 * faces[3 * f + c] + k] - tree->centre[k]) * tree->scale;
        unsorted[9 * f + 3 * c + k] = x;
        builder.middle[3 * f + k] += x / 3;
      }
  }
  tree->nodes.emplace_back();
  builder.build(0, 0, n_faces);
  tree->triangles.resize(9 * n_faces);
  tree->face.resize(n_faces);
  for (int64_t i = 0; i < n_faces; ++i) {
    tree->face[i] = builder.order[i];
    std::copy_n(&unsorted[9 * static_cast<int64_t>(builder.order[i])], 9, &tree->triangles[9 * i]);
  }
  tree->dipoles.resize(tree->nodes.size());
  std::vector<int32_t> all_;
  builder.fit(0, all_);
  return tree.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

HH_API void hh_bvh_free(void* handle) { delete static_cast<Bvh*>(handle); }

// points (n,3) -> face (n), bary (n,3), squared distance (n)
HH_API void hh_bvh_closest(const void* handle, int64_t n, const double* points, int64_t* face, double* bary, double* d2, int threads) {
  const BvhView m = static_cast<const Bvh*>(handle)->view();
  parallel_ranges(n, 256, threads, [&](int64_t b, int64_t e) { kernels().bvh_closest(m, points, b, e, face, bary, d2); });
}

HH_API void hh_bvh_winding(const void* handle, int64_t n, const double* points, float beta, double* out, int threads) {
  const BvhView m = static_cast<const Bvh*>(handle)->view();
  parallel_ranges(n, 256, threads, [&](int64_t b, int64_t e) { kernels().bvh_winding(m, points, b, e, beta * beta, out); });
}

// origins, directions (n,3) -> face (n) or -1, bary (n,3), t (n) or inf
HH_API void hh_bvh_rays(const void* handle, int64_t n, const double* origins, const double* directions, int64_t* face, double* bary, double* t, int threads) {
  const BvhView m = static_cast<const Bvh*>(handle)->view();
  parallel_ranges(n, 256, threads, [&](int64_t b, int64_t e) { kernels().bvh_rays(m, origins, directions, b, e, face, bary, t); });
}
