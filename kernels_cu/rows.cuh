// Whose rows a tile has: those of one query head, or those of all query heads that share k and v.
#pragma once

#include "schedule.cuh"

// Half-open range of rows or keys; empty when end <= begin.
struct Range {
    int begin, end;
    DEV_METHOD bool empty() const { return end <= begin; }
};

// Whether a kernel's tiles have rows of all heads of a group; most Configs do not speak of it.
template <class C, class = void> constexpr bool GROUPED = false;
template <class C> constexpr bool GROUPED<C, decltype((void)C::GROUPED)> = C::GROUPED;

// Rows concept: what a row of a tile is. `head` and `work.head` name the first query head of a tile.
//   GROUPED            are there rows of several heads?
//   query(row)         its query; at least len_q for a row past the end
//   member(row)        its head, counted from the first
//   queries(rows)      range of the queries of these rows
//   place(row, len_q)  where it stands in arrays [.., H, Lq], counted from the first head's query 0
struct HeadRows {
    static constexpr bool GROUPED = false;
    DEV_METHOD explicit HeadRows(const Shape&) {}
    DEV_METHOD int query(int row) const { return row; }
    DEV_METHOD int member(int) const { return 0; }
    DEV_METHOD Range queries(Range rows) const { return rows; }
    DEV_METHOD int place(int row, int) const { return row; }
};

// Query after query, and of each the heads of the group one after the other: the queries of a tile
// stay close together, so that it walks few keys that some of its rows must not see.
struct GroupRows {
    static constexpr bool GROUPED = true;
    // Into constant memory: a main loop has no registers to keep what it can read there.
    const Shape* shape;

    DEV_METHOD explicit GroupRows(const Shape& from) : shape(&from) {}
    DEV_METHOD int query(int row) const { return (u32)row / (u32)shape->group; }
    DEV_METHOD int member(int row) const { return (u32)row % (u32)shape->group; }
    DEV_METHOD Range queries(Range rows) const {
        return {query(rows.begin), query(rows.end - 1) + 1};
    }
    DEV_METHOD int place(int row, int len_q) const { return member(row) * len_q + query(row); }
    // In a map of tiles, which are those of whole groups.
    DEV_METHOD int map_head(int head) const { return head / shape->group; }
};
