defmodule VLLM.Job.MachineTest do
  use ExUnit.Case, async: true

  alias VLLM.Job.Machine

  @moduletag :tmp_dir
  @gib 1024 * 1024 * 1024

  defp write!(folder, files) do
    File.mkdir_p!(folder)
    for {name, text} <- files, do: File.write!(Path.join(folder, name), text)
  end

  test "memory is that of the system, where no control group has less", %{tmp_dir: folder} do
    {available, total} = Machine.memory(folder)
    assert 0 < available and available < total

    write!(folder, [{"memory.max", "max\n"}, {"memory.current", "4096\n"}])

    write!(Path.join(folder, "memory"), [
      {"memory.limit_in_bytes", "9223372036854771712\n"},
      {"memory.usage_in_bytes", "4096\n"}
    ])

    assert {_available, ^total} = Machine.memory(folder)
  end

  # Smaller than any machine has that these tests run on.
  for {version, below, limit, usage, cached} <- [
        {1, "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"},
        {2, "", "memory.max", "memory.current", "file"}
      ] do
    test "a control group of version #{version} allows what it has left, with its page cache",
         %{tmp_dir: folder} do
      write!(Path.join(folder, unquote(below)), [
        {unquote(limit), "#{div(@gib, 8)}\n"},
        {unquote(usage), "#{div(@gib, 8) - 1_000}\n"},
        {"memory.stat", "rss 5\n#{unquote(cached)} 700\nanon 7\n"}
      ])

      assert Machine.memory(folder) == {1_700, div(@gib, 8)}
    end

    test "so does each between the first group of version #{version} and the own one",
         %{tmp_dir: folder} do
      own = Path.join(folder, "own")
      File.write!(own, "9:pids:/\n4:memory:/a.slice/b.service\n0::/a.slice/b.service\n")
      {_available, total} = Machine.memory(folder, own)

      for {group, bytes} <- [{"", 4 * total}, {"a.slice", 9_000}, {"a.slice/b.service", 7_000}] do
        write!(Path.join([folder, unquote(below), group]), [
          {unquote(limit), "#{bytes}\n"},
          {unquote(usage), "6000\n"}
        ])
      end

      assert Machine.memory(folder, own) == {1_000, 7_000}
      File.write!(Path.join([folder, unquote(below), "a.slice", unquote(usage)]), "8900\n")
      assert Machine.memory(folder, own) == {100, 7_000}
    end
  end
end
