# Jobs under random kills: a BEAM of its own makes two GGUF files of the demo model; at a random moment
# its process, a guard or a step's worker gets SIGKILL. Then nothing may hang, nothing half may be
# listed, no process and no file may be left but what a retry goes on from, and a retry must end well.
#
#     mix run bench/jobs.exs [--kills 20] [--seed 1] [--made-up]
#
# With --made-up the steps are those of test/support/fake_job.py, which take no time: more kills by the
# minute, of the same Elixir and the same guard.
#
#     unshare -rm mix run bench/jobs.exs --full-disks 20 [--seed 1]
#
# Such a job on a disk that becomes full, each time at another moment: it fails and says so, nothing is
# left, and it ends well once the disk is larger.
#
#     mix run bench/jobs.exs --little-memory 10 [--seed 1]
#
# A job in a control group (version 1, as root) that has some of the memory that a step needs, each
# time another share; the step makes the output or, every other time, measures it: the system kills the
# step and not the BEAM, the job says what it was and what to do, nothing is left, and it ends well once
# the group has no limit.

for file <- ~w(os_process footprint demo_model fake_jobs) do
  path = Path.expand("../test/support/#{file}.ex", __DIR__)
  unless Mix.env() == :test, do: Code.require_file(path)
end

defmodule Bench.Jobs do
  import VLLM.OSProcess

  # Longer than anything may take that does not hang, in ms.
  @patience 300_000

  # Makes a model, or goes on with the job that is there, until it is done; says so in lines.
  @child """
  Logger.configure(level: :none)
  Application.put_env(:ex_vllm, :data_dir, System.fetch_env!("BENCH_DATA"))
  {:ok, _} = Application.ensure_all_started(:ex_vllm)
  {model, options} = System.fetch_env!("BENCH_JOB") |> Base.decode64!() |> :erlang.binary_to_term()

  make = fn make ->
    job =
      case VLLM.Job.list() do
        [] -> VLLM.Job.quantize(model, options)
        [%{state: :done} = job] -> {:ok, job}
        [job] -> VLLM.Job.retry(job)
      end

    IO.puts("began")

    with {:ok, job} <- job, {:ok, _} <- VLLM.Job.await(job, progress: false) do
      IO.puts("done")
    else
      {:error, error} ->
        IO.puts("failed " <> Atom.to_string(error.reason))
        # Until it is told to.
        IO.gets("")
        make.(make)
    end
  end

  make.(make)
  System.halt(0)
  """

  def run(options) do
    :rand.seed(:exsss, options[:seed])
    {model, job} = job(options)
    folder = Path.join(System.tmp_dir!(), "jobs-#{System.pid()}")
    setting = %{folder: folder, job: {model, job}}

    try do
      {time, outputs} = whole(setting)
      IO.puts("An undisturbed job takes #{time} ms and makes #{inspect(outputs)}.")

      cond do
        count = options[:full_disks] -> full_disks(setting, count, outputs)
        count = options[:little_memory] -> little_memory(setting, count, outputs)
        true -> kills(setting, options[:kills], time, outputs)
      end
    after
      File.rm_rf!(folder)
    end
  end

  defp kills(setting, count, time, outputs) do
    results =
      for number <- 1..count do
        target = Enum.at([:beam, :guard, :step], rem(number, 3))
        result = round(setting, target, :rand.uniform(time), outputs)
        IO.puts("#{number} #{target} #{inspect(result)}")
        {target, result}
      end

    for {target, results} <- Enum.group_by(results, &elem(&1, 0), &elem(&1, 1)) do
      ends = results |> Enum.map(& &1.heard) |> Enum.frequencies()
      hits = Enum.count(results, & &1.hit)
      IO.puts("#{target}: #{length(results)} rounds, #{hits} kills, #{inspect(ends)}")

      # Of the others the retry is in it.
      if target == :beam do
        slowest = results |> Enum.map(& &1.gone) |> Enum.max()
        IO.puts("all gone after #{slowest} ms at most")
      end
    end
  end

  # Kilobytes of the disk: of the 64 MiB that a job leaves to others, and of two outputs.
  @reserve 65_536
  @both 47_000

  defp full_disks(setting, count, outputs) do
    disk = Path.join(setting.folder, "data")

    ends =
      for number <- 1..count do
        # Of ten one that does not even take what is noted of the job.
        size = if rem(number, 10) == 0, do: 4, else: @reserve + :rand.uniform(@both)
        File.mkdir_p!(disk)
        mount(disk, ["size=#{size}k"])

        try do
          made = full_disk(setting, disk, outputs)
          IO.puts("#{number} #{size} kB #{made} made before")
          made
        after
          {_, 0} = System.cmd("umount", [disk])
          File.rm_rf!(setting.folder)
        end
      end

    IO.puts("full disks: #{count}, outputs made before: #{inspect(Enum.frequencies(ends))}")
  end

  defp full_disk(setting, disk, outputs) do
    child = start(setting)
    "began" = line(child)
    "failed disk_full" = line(child)
    made = sizes(setting)
    for {label, size} <- made, do: {^label, ^size} = {label, outputs[label]}
    [] = left(setting)
    [] = for pid <- descendants(child.os_pid), what(command(pid)) != :other, do: pid
    mount(disk, ["remount", "size=#{2 * (@reserve + @both)}k"])
    go_on(child)
    ["began", "done"] = lines(child)
    ^outputs = sizes(setting)
    [] = left(setting)
    map_size(made)
  end

  defp mount(disk, options) do
    options = Enum.join(options, ",")
    {_, 0} = System.cmd("mount", ["-t", "tmpfs", "-o", options, "none", disk])
  end

  defp little_memory(setting, count, outputs) do
    group = "/sys/fs/cgroup/memory/jobs-#{System.pid()}"
    File.mkdir!(group)
    setting = Map.put(setting, :group, group)

    try do
      steps = for step <- ["quantize", "measure"], do: {step, needed(setting, step)}

      for {step, {before, more}} <- steps,
          do: IO.puts("#{step}: #{mebibytes(before)} are used, and #{mebibytes(more)} needed")

      for number <- 1..count do
        {step, {before, more}} = Enum.at(steps, rem(number, 2))
        # So that it is neither the BEAM that is killed nor nobody.
        limit = before + round((0.2 + 0.6 * :rand.uniform()) * more)
        killed(setting, step, limit, outputs)
        IO.puts("#{number} #{step}, killed at #{mebibytes(limit)}")
      end

      # Which is refused while one process is in it.
      true = eventually(fn -> File.rmdir(group) == :ok end)
      IO.puts("little memory: #{count} jobs, #{count} steps killed, #{count} retried")
    after
      File.rmdir(group)
    end
  end

  # Bytes of memory without page cache: when the step begins, and how many more at most until it ends.
  defp needed(setting, step) do
    child = start(verifying(setting, step))
    "began" = line(child)
    begun(setting, step)
    before = used(setting)
    peak = Task.async(fn -> peak(setting, before) end)
    ["done"] = lines(child)
    send(peak.pid, :done)
    most = Task.await(peak)
    File.rm_rf!(setting.folder)
    {before, most - before}
  end

  defp peak(setting, most) do
    receive do
      :done -> most
    after
      10 -> peak(setting, max(most, used(setting)))
    end
  end

  defp used(%{group: group}) do
    [_, bytes] = Regex.run(~r/^total_rss (\d+)$/m, File.read!(Path.join(group, "memory.stat")))
    String.to_integer(bytes)
  end

  defp killed(setting, step, limit, outputs) do
    child = start(verifying(setting, step))
    "began" = line(child)
    begun(setting, step)
    limit(setting, limit)
    "failed out_of_memory" = line(child)
    told = "has killed the process of the step `#{step}` for want of memory. Stop engines"
    true = log(setting) =~ told
    0 = map_size(sizes(setting))
    [] = left(setting)
    [] = for pid <- descendants(child.os_pid), what(command(pid)) != :other, do: pid
    limit(setting, -1)
    go_on(child)
    ["began", "done"] = lines(child)
    ^outputs = sizes(setting)
    gone_after(setting, 0)
    [] = left(setting)
    File.rm_rf!(setting.folder)
  end

  defp verifying(%{job: {model, options}} = setting, step),
    do: %{setting | job: {model, Keyword.put(options, :verify, step == "measure")}}

  defp begun(setting, step),
    do: true = eventually(fn -> log(setting) =~ "== #{step} " end, @patience)

  defp log(setting) do
    [setting.folder, "data/jobs/*/log"]
    |> Path.join()
    |> Path.wildcard()
    |> Enum.map_join(&File.read!/1)
  end

  defp limit(%{group: group}, bytes),
    do: File.write!(Path.join(group, "memory.limit_in_bytes"), Integer.to_string(bytes))

  defp mebibytes(bytes), do: "#{div(bytes, 1024 * 1024)} MiB"

  defp job(options) do
    model = VLLM.DemoModel.path()

    cond do
      options[:full_disks] -> made_up(model, "fill:24")
      options[:little_memory] -> {model, [to: [gguf: ["Q8_0"]], name: "made", verify: false]}
      options[:made_up] -> made_up(model, "print:working;sleep:0.3")
      true -> {model, [to: [gguf: ["Q8_0", "Q4_K_M"]], name: "made", verify: false]}
    end
  end

  defp made_up(model, script) do
    to = for label <- [:a, :b], do: {label, [quantize: script]}
    {model, VLLM.FakeJobs.options(to, name: "made", verify: false)}
  end

  # What an undisturbed job makes: the sizes of its outputs.
  defp whole(setting) do
    child = start(setting)
    "began" = line(child)
    began = System.monotonic_time(:millisecond)
    ["done"] = lines(child)
    time = System.monotonic_time(:millisecond) - began
    outputs = sizes(setting)
    File.rm_rf!(setting.folder)
    {time, outputs}
  end

  defp round(setting, target, after_ms, outputs) do
    child = start(setting)
    "began" = line(child)
    Process.sleep(after_ms)
    killed = System.monotonic_time(:millisecond)
    hit = kill(target, child)
    heard = child |> lines() |> Enum.reject(&(&1 == "began"))
    gone = gone_after(setting, killed)
    # Whatever has a place is whole, and nothing has that is not.
    for {label, size} <- sizes(setting), do: {^label, ^size} = {label, outputs[label]}

    # The next BEAM goes on.
    heard =
      case List.last(heard) do
        "done" ->
          heard

        _cut_off ->
          child = start(setting)
          "done" = child |> lines() |> List.last()
          heard ++ ["retried"]
      end

    ^outputs = sizes(setting)
    gone_after(setting, killed)
    [] = left(setting)
    File.rm_rf!(setting.folder)
    %{hit: hit, heard: Enum.join(heard, ", "), gone: gone}
  end

  defp start(%{folder: folder, job: job} = setting) do
    File.mkdir_p!(Path.join(folder, "tmp"))
    paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])
    elixir = [System.find_executable("elixir") | paths] ++ ["-e", @child]
    [command | arguments] = into_group(setting[:group], elixir)

    port =
      Port.open({:spawn_executable, command}, [
        {:line, 10_000},
        :binary,
        :exit_status,
        args: arguments,
        env:
          for {name, value} <- [
                {"TMPDIR", Path.join(folder, "tmp")},
                {"BENCH_DATA", Path.join(folder, "data")},
                {"BENCH_JOB", job |> :erlang.term_to_binary() |> Base.encode64()}
              ] do
            {to_charlist(name), to_charlist(value)}
          end
      ])

    {:os_pid, os_pid} = Port.info(port, :os_pid)
    %{port: port, os_pid: os_pid}
  end

  defp into_group(nil, command), do: command

  defp into_group(group, command) do
    enter = ~S(echo $$ > "$0/cgroup.procs" && exec "$@")
    [System.find_executable("sh"), "-c", enter, group | command]
  end

  defp line(%{port: port}) do
    receive do
      {^port, {:data, {:eol, line}}} -> line
      {^port, {:exit_status, _}} -> nil
    after
      @patience -> raise "the BEAM says nothing any more: it hangs"
    end
  end

  # All that it says, until it has ended.
  defp lines(child) do
    line = line(child)
    if match?("failed " <> _, line), do: go_on(child)
    if line, do: [line | lines(child)], else: []
  end

  defp go_on(child), do: Port.command(child.port, "go on\n")

  defp kill(:beam, child), do: signal("KILL", child.os_pid)

  # Between two steps there is none for a moment.
  defp kill(target, child) do
    eventually(
      fn ->
        found = for pid <- descendants(child.os_pid), what(command(pid)) == target, do: pid
        found != [] and signal("KILL", Enum.random(found))
      end,
      1_000
    )
  end

  defp what(command) do
    cond do
      command =~ ~r/\0--(witness|alone|sweep|end)\0/ -> :helper
      command =~ "guard.py" -> :guard
      command =~ ~r/vllm_bridge\0(job|tools)|fake_job/ -> :step
      true -> :other
    end
  end

  defp sizes(setting) do
    for folder <- Path.wildcard(Path.join(setting.folder, "data/models/*/*")), into: %{} do
      files = Path.wildcard(Path.join(folder, "**"))
      {Path.basename(folder), files |> Enum.map(&File.stat!(&1).size) |> Enum.sum()}
    end
  end

  defp gone_after(setting, since) do
    unless eventually(fn -> running(setting) == [] end, 30_000),
      do: raise("left over: #{inspect(running(setting))}")

    System.monotonic_time(:millisecond) - since
  end

  # Every process of a run has the folder's name in its environment or its arguments.
  defp running(setting) do
    for entry <- File.ls!("/proc"),
        {pid, ""} <- [Integer.parse(entry)],
        file <- ["environ", "cmdline"],
        {:ok, text} <- [File.read("/proc/#{pid}/#{file}")],
        String.contains?(text, setting.folder),
        alive?(pid),
        uniq: true,
        do: pid
  end

  # Beside the outputs, the registry and the record of the job with its log.
  defp left(setting) do
    runs = Path.wildcard(Path.join(setting.folder, "tmp/ex_vllm-*/*"))
    jobs = Path.wildcard(Path.join(setting.folder, "data/jobs/*/*"), match_dot: true)
    runs ++ Enum.reject(jobs, &(Path.basename(&1) in ["job", "log"]))
  end
end

{options, [], []} =
  OptionParser.parse(System.argv(),
    strict: [
      kills: :integer,
      seed: :integer,
      made_up: :boolean,
      full_disks: :integer,
      little_memory: :integer
    ]
  )

Bench.Jobs.run(Keyword.merge([kills: 20, seed: 1], options))
