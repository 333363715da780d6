defmodule VLLM.Python.Setup do
  @moduledoc false
  # Makes the virtual environment that holds vLLM, and the one that quantizes:
  # what `mix vllm.setup` does.
  #
  # A set-up that was interrupted is continued by the next one. One that is
  # complete is left alone and costs nothing. An environment that was made from
  # another lock is made anew, so that nothing of the old one stays behind.

  alias VLLM.{Disk, Error, Python}
  alias VLLM.Python.{Command, Pip, Stamp}

  # What the environment takes, with room for the downloads.
  @gib 1024 * 1024 * 1024
  @disk_gib %{cpu: 6, cuda: 20, quantize: 4}

  # PyPI does not hold torch's builds for CPUs; PyTorch's own index does.
  @torch_cpu_index "https://download.pytorch.org/whl/cpu"

  # For what is compiled: llama.cpp builds ggml so, and ggml alone is built without. Products of
  # a few tokens take half the time.
  @cmake_args "-DGGML_LLAMAFILE=ON"

  # Of llama.cpp only its library: its programs, their common code and what reads pictures are two
  # thirds of the time that it takes to compile.
  @llama_cmake_args "-DLLAVA_BUILD=OFF -DLLAMA_ALL_WARNINGS=OFF"

  @type option ::
          {:device, Python.device()}
          | {:venv, Path.t()}
          | {:python, String.t()}
          | {:with, [String.t()]}
          | {:repair, boolean()}
          | {:test, boolean()}
          | {:force, boolean()}

  @typedoc "A phase is over with the next one; progress is told within a phase."
  @type report :: ({:phase | :progress, String.t()} -> term())

  @type plan :: %{
          venv: Path.t(),
          environment: Python.environment(),
          python: String.t() | nil,
          want: Stamp.t(),
          repair: [String.t()],
          force: boolean(),
          report: report()
        }

  @doc """
  Makes the virtual environments that are asked for, or completes them.

    * `:device` - `:cpu` or `:cuda`; default: what this machine has
    * `:venv` - the folder; default: VLLM_VENV or the library's own. That of what quantizes is
      beside it
    * `:python` - the interpreter to make it with; default: the first of
      `python3`, `python3.13` ... that vLLM runs on
    * `:with` - extras (`Python.extras/0`) to install too. Those of an earlier set-up of
      the same environment stay, also where it is made anew. With `quantize`, or where that
      was set up before, the environment that quantizes too
    * `:repair` - installs the extras of `:with` also where they were installed before
    * `:test` - installs the tools of this library's own tests too, and all extras
    * `:force` - makes it anew, also where it is complete or somebody else's

  `report` is called with `{:phase, text}` and `{:progress, text}`. Returns
  `{:ok, :unchanged | :installed, folder}` with the folder of vLLM's environment.
  """
  @spec run([option()], report()) ::
          {:ok, :unchanged | :installed, Path.t()} | {:error, Error.t()}
  def run(opts, report \\ fn _ -> :ok end) do
    with {:ok, names} <- names(opts),
         serving = serving(names -- ["quantize"], opts, report),
         {:ok, status, venv} <- run_plan(serving),
         {:ok, other} <- run_quantizing("quantize" in names, opts, report) do
      {:ok, if(:installed in [status, other], do: :installed, else: :unchanged), venv}
    end
  end

  defp serving(extras, opts, report) do
    device = opts[:device] || Python.device()

    %{
      venv: venv(opts[:venv], opts[:device]),
      environment: device,
      python: opts[:python],
      want: %Stamp{
        state: :ready,
        lock: Stamp.hash(Python.lock(device)),
        test: if(opts[:test], do: Stamp.hash(Python.lock(:test))),
        extras: hashes(extras)
      },
      repair: if(opts[:repair], do: extras, else: []),
      force: opts[:force] || false,
      report: report
    }
  end

  # One that was set up is kept as extras are; but it is made anew only where it is asked for.
  defp run_quantizing(asked?, opts, report) do
    venv = if opts[:venv], do: Python.quantize_dir(opts[:venv]), else: Python.quantize_dir()

    if asked? or Stamp.read(venv).state != nil do
      plan = %{
        venv: venv,
        environment: :quantize,
        python: opts[:python],
        want: %Stamp{state: :ready, lock: Stamp.hash(Python.lock(:quantize))},
        repair: [],
        force: (asked? and opts[:force]) || false,
        report: report
      }

      with {:ok, status, _venv} <- run_plan(plan), do: {:ok, status}
    else
      {:ok, :unchanged}
    end
  end

  defp names(opts) do
    names = if opts[:test], do: Python.extras(), else: []
    names = Enum.uniq(names ++ (opts[:with] || []))

    Enum.reduce_while(names, {:ok, []}, fn name, {:ok, extras} ->
      case Python.extra(name) do
        {:ok, extra} -> {:cont, {:ok, [extra | extras]}}
        error -> {:halt, error}
      end
    end)
  end

  defp hashes(extras), do: Map.new(extras, &{&1, Stamp.hash(Python.lock(&1))})

  defp run_plan(plan) do
    cond do
      :os.type() != {:unix, :linux} ->
        {:error, Error.new(:unsupported, "vLLM runs on Linux; this is another system.")}

      complete?(plan) ->
        {:ok, :unchanged, plan.venv}

      true ->
        alone(plan, fn ->
          # Somebody else may have done it while this one waited.
          if complete?(plan) do
            {:ok, :unchanged, plan.venv}
          else
            plan = keep_extras(plan)
            with :ok <- install(plan), do: {:ok, :installed, plan.venv}
          end
        end)
    end
  end

  defp venv(nil, nil), do: Python.venv_dir()

  defp venv(nil, device) do
    case Python.source() do
      {:env, venv} -> venv
      _ -> Python.venv_dir(device)
    end
  end

  defp venv(folder, _device), do: Path.expand(folder)

  defp complete?(plan) do
    stamp = Stamp.read(plan.venv)

    not plan.force and Stamp.ready?(plan.venv) and stamp.lock == plan.want.lock and
      plan.want.test in [nil, stamp.test] and
      missing_extras(keep_extras(plan), stamp) == []
  end

  # Those of an earlier set-up, in the versions of this release.
  defp keep_extras(plan) do
    installed =
      for name <- Map.keys(Stamp.read(plan.venv).extras), name in Python.extras(), do: name

    put_in(plan.want.extras, Map.merge(hashes(installed), plan.want.extras))
  end

  defp missing_extras(plan, stamp) do
    for {name, hash} <- plan.want.extras,
        stamp.extras[name] != hash or name in plan.repair,
        do: name
  end

  # The lock is on the folder above, which is there before the environment is,
  # and it is the kernel that ends it when this process ends, however it does.
  defp alone(plan, fun) do
    parent = Path.dirname(plan.venv)

    with :ok <- make_folder(parent) do
      case {System.find_executable("flock"), System.find_executable("cat")} do
        {flock, cat} when is_binary(flock) and is_binary(cat) ->
          port =
            Port.open({:spawn_executable, flock}, [:binary, :exit_status, args: [parent, cat]])

          Port.command(port, "\n")

          # What ran in a BEAM that was killed may be ending still.
          locked = await_lock(port, plan, 1_000)
          cleared = if locked == :locked, do: Command.end_leftovers(plan.venv), else: :ok
          result = with :ok <- cleared, do: fun.()
          Port.close(port)
          result

        _ ->
          fun.()
      end
    end
  end

  defp await_lock(port, plan, patience) do
    receive do
      {^port, {:data, _}} -> :locked
      # A file system without locks.
      {^port, {:exit_status, _}} -> :unlocked
    after
      patience ->
        plan.report.({:phase, "Waiting for another set-up in #{Path.dirname(plan.venv)}"})
        await_lock(port, plan, :infinity)
    end
  end

  defp make_folder(folder) do
    case File.mkdir_p(folder) do
      :ok -> :ok
      {:error, reason} -> {:error, not_writable(folder, reason)}
    end
  end

  defp install(plan) do
    with :ok <- check_owner(plan),
         :ok <- check_disk(plan),
         :ok <- ensure_venv(plan),
         :ok <- install_lock(plan),
         :ok <- install_extras(plan),
         :ok <- install_tests(plan) do
      # Test packages of an earlier set-up stay in.
      test = plan.want.test || Stamp.read(plan.venv).test
      write_stamp(plan, %{plan.want | test: test})
    end
  end

  # Never touches what `mix vllm.setup` did not make, unless told to; and then
  # only what is a virtual environment.
  defp check_owner(%{venv: venv} = plan) do
    case {File.ls(venv), Stamp.read(venv).state} do
      {{:error, :enoent}, _} -> :ok
      {{:ok, []}, _} -> :ok
      {{:ok, _}, state} when state != nil -> :ok
      {{:ok, files}, nil} -> check_foreign(plan, "pyvenv.cfg" in files)
      {{:error, reason}, _} -> {:error, not_writable(venv, reason)}
    end
  end

  defp check_foreign(%{force: true}, true), do: :ok

  defp check_foreign(plan, true) do
    {:error,
     Error.new(
       :vllm_not_installed,
       "#{plan.venv} is a virtual environment that `mix vllm.setup` did not make. Give " <>
         "`--venv` (or VLLM_VENV) another folder, or `--force` to have it replaced.",
       %{"venv" => plan.venv}
     )}
  end

  defp check_foreign(plan, false) do
    {:error,
     Error.new(
       :vllm_not_installed,
       "#{plan.venv} is not empty and not a virtual environment. Give `--venv` (or VLLM_VENV) " <>
         "another folder.",
       %{"venv" => plan.venv}
     )}
  end

  # What an environment already holds of the lock needs no room again.
  defp check_disk(plan) do
    if Stamp.read(plan.venv).lock == plan.want.lock do
      :ok
    else
      check_disk(plan, Path.dirname(plan.venv), @disk_gib[plan.environment])
    end
  end

  defp check_disk(plan, folder, need) do
    case Disk.free(folder) do
      {:ok, free} when free < need * @gib ->
        {:error,
         Error.new(
           :vllm_not_installed,
           "#{what(plan)} needs #{need} GiB of disk space, and #{folder} has " <>
             "#{Float.round(free / @gib, 1)} GiB. Free some, or give `--venv` (or VLLM_VENV) " <>
             "a folder on another disk.",
           %{"free_bytes" => free, "needed_gib" => need}
         )}

      _ ->
        :ok
    end
  end

  defp ensure_venv(plan) do
    stamp = Stamp.read(plan.venv)

    if not plan.force and stamp.lock == plan.want.lock and pip?(plan.venv) do
      :ok
    else
      with {:ok, python, version} <- find_python(plan),
           :ok <- check_libraries(plan, python) do
        make_venv(plan, python, version)
      end
    end
  end

  defp what(%{environment: :quantize}), do: "Quantizing"
  defp what(%{environment: device}), do: "vLLM #{Python.vllm_version(device)} for #{device}"

  # Without it vLLM's kernels fail to load, with a message that does not say so.
  defp check_libraries(plan, python) do
    case Python.missing_libraries(python, plan.environment) do
      [] -> :ok
      missing -> {:error, no_library(missing)}
    end
  end

  defp no_library(missing) do
    Error.new(
      :vllm_not_installed,
      "vLLM needs the system's #{Enum.join(missing, ", ")}. On Debian and Ubuntu: " <>
        "`apt-get install libnuma1`; then run `mix vllm.setup` again.",
      %{"missing" => missing}
    )
  end

  defp make_venv(plan, python, version) do
    plan.report.({:phase, "Making a virtual environment with Python #{version} in #{plan.venv}"})

    with {:ok, _} <- File.rm_rf(plan.venv),
         :ok <- make_folder(plan.venv),
         :ok <- write_stamp(plan, beginning(plan.want)) do
      case Command.run(plan.venv, python, ["-m", "venv", plan.venv]) do
        {:ok, _} -> :ok
        {:error, lines} -> {:error, venv_failed(lines)}
      end
    else
      {:error, reason, path} -> {:error, not_writable(path, reason)}
      {:error, %Error{}} = error -> error
    end
  end

  # Extras that an environment had before it was made anew are not lost with an interruption.
  defp beginning(want) do
    extras = Map.new(want.extras, fn {name, _hash} -> {name, "wanted"} end)
    %Stamp{state: :installing, lock: want.lock, extras: extras}
  end

  defp venv_failed(lines) do
    {what, remedy} =
      cond do
        Enum.any?(lines, &(&1 =~ ~r/ensurepip|No module named venv/)) ->
          {"This Python has no venv module.",
           "On Debian and Ubuntu: `apt-get install python3-venv`; then run `mix vllm.setup` again."}

        Pip.cause(lines) == :disk ->
          {"The disk is full.", "Free some space and run `mix vllm.setup` again."}

        true ->
          {"Python could not make a virtual environment.", "See what it said below."}
      end

    failed(what, remedy, lines)
  end

  defp pip?(venv) do
    python = Path.join(venv, "bin/python")

    System.find_executable(python) != nil and
      match?({_, 0}, System.cmd(python, ["-I", "-c", "import pip"], stderr_to_stdout: true))
  end

  @candidates ["python3", "python3.13", "python3.12", "python3.11", "python3.14"]

  defp find_python(plan) do
    requirement = Python.requirement(plan.environment)
    names = if plan.python, do: [plan.python], else: @candidates
    found = for name <- names, {path, version} <- [version(name)], do: {path, version}

    case Enum.find(found, fn {_, version} -> Version.match?(version, requirement) end) do
      {path, version} -> {:ok, path, version}
      nil -> {:error, no_python(plan, found, requirement)}
    end
  end

  defp version(name) do
    with path when path != nil <- System.find_executable(name),
         version when version != nil <- Python.version(path) do
      {path, version}
    else
      _ -> nil
    end
  end

  defp no_python(%{python: nil} = plan, [], requirement) do
    Error.new(
      :python_not_found,
      "There is no Python 3 on this machine (#{what(plan)} needs #{requirement}). On Debian and " <>
        "Ubuntu: `apt-get install python3 python3-venv`; or give `--python` the path of one."
    )
  end

  defp no_python(%{python: asked}, [], _requirement) do
    Error.new(:python_not_found, "`--python #{asked}` is not a Python 3 that can be run.")
  end

  defp no_python(plan, found, requirement) do
    versions = Enum.map_join(found, ", ", fn {_, version} -> version end)

    Error.new(
      :python_not_found,
      "#{what(plan)} needs Python #{requirement}; found #{versions}. Install one that fits and " <>
        "give `--python` its path.",
      %{"found" => versions, "needed" => requirement}
    )
  end

  defp install_lock(plan) do
    if Stamp.read(plan.venv).state == :ready do
      :ok
    else
      pins = Python.pins(plan.environment)

      with :ok <- install_torch(plan, List.keyfind(pins, "torch", 0)) do
        plan.report.({:phase, "#{what(plan)}: installing #{length(pins)} packages"})
        pip_install_lock(plan, plan.environment)
      end
    end
  end

  # Plain first: pip may be configured with a place that has the CPU build, or
  # hold it in its cache, and that place is the one that this machine can reach.
  defp install_torch(plan, {"torch", version}) do
    pin = "torch==" <> version
    plan.report.({:phase, "Installing torch #{version}"})

    case pip_install(plan, [pin], 1) do
      {:error, %Error{details: %{"missing" => ^pin}}} when plan.environment != :cuda ->
        plan.report.({:phase, "Installing torch #{version} from PyTorch's index of CPU builds"})
        pip_install(plan, ["--extra-index-url", @torch_cpu_index, pin], 1)

      result ->
        result
    end
  end

  defp install_extras(plan) do
    Enum.reduce_while(missing_extras(plan, Stamp.read(plan.venv)), :ok, fn name, :ok ->
      plan.report.({:phase, "Installing #{name}"})

      case pip_install_lock(plan, name) do
        :ok -> {:cont, :ok}
        error -> {:halt, error}
      end
    end)
  end

  defp install_tests(%{want: %{test: nil}}), do: :ok

  defp install_tests(plan) do
    if Stamp.read(plan.venv).test == plan.want.test do
      :ok
    else
      plan.report.({:phase, "Installing #{length(Python.pins(:test))} packages for the tests"})
      pip_install_lock(plan, :test)
    end
  end

  defp pip_install_lock(plan, name) do
    sources = Enum.flat_map(Python.from_source(name), &["--no-binary", &1])

    with :ok <- compile(plan, name) do
      lock = sources ++ ["--requirement", Python.lock(name)]
      pip_install(plan, lock, length(Python.pins(name)))
    end
  end

  # Apart from the rest: pip's cache may serve machines whose processors cannot run what this one
  # compiles, and the rest should not be downloaded again after an interruption.
  defp compile(plan, name) do
    pins = Map.new(Python.pins(name))

    case Python.compiled(name) do
      [] ->
        :ok

      packages ->
        plan.report.({:phase, "Compiling #{Enum.join(packages, ", ")}"})
        sources = Enum.flat_map(packages, &["--no-binary", &1])
        pins = for package <- packages, do: "#{package}==#{pins[package]}"
        pip_install(plan, ["--no-cache-dir"] ++ sources ++ pins, length(packages))
    end
  end

  defp pip_install(plan, args, total) do
    pip = ["-m", "pip", "install", "--no-input", "--no-deps", "--disable-pip-version-check"]
    # Building from source takes compilers and an hour; a lack of wheels is
    # better told at once. What a lock says is compiled takes half a minute.
    pip = pip ++ ["--only-binary", ":all:", "--progress-bar", "off"]
    done = :counters.new(1, [])

    on_line = fn
      :heartbeat -> plan.report.({:progress, "#{installed(plan.venv)} packages are installed"})
      line -> progress(plan, Pip.event(line), done, total)
    end

    python = Path.join(plan.venv, "bin/python")
    env = %{"CMAKE_ARGS" => "#{cmake_args(plan)} #{System.get_env("CMAKE_ARGS")}"}

    case Command.run(plan.venv, python, pip ++ args, on_line, env) do
      {:ok, _} -> :ok
      {:error, lines} -> {:error, pip_failed(lines)}
    end
  end

  defp cmake_args(%{environment: :quantize}) do
    file = Application.app_dir(:ex_vllm, "priv/requirements/llama_cpp.cmake")
    ~s(#{@cmake_args} #{@llama_cmake_args} "-DCMAKE_PROJECT_llama_cpp_INCLUDE=#{file}")
  end

  defp cmake_args(_plan), do: @cmake_args

  defp progress(plan, {:package, package}, done, total) do
    :counters.add(done, 1, 1)
    plan.report.({:progress, "[#{:counters.get(done, 1)}/#{total}] #{package}"})
  end

  defp progress(plan, :installing, _done, _total), do: plan.report.({:progress, "unpacking"})
  defp progress(_plan, nil, _done, _total), do: :ok

  defp installed(venv) do
    length(Path.wildcard(Path.join(venv, "lib/python3*/site-packages/*.dist-info")))
  end

  defp pip_failed(lines) do
    cause = Pip.cause(lines)
    missing = if cause == :version, do: Pip.missing(lines)
    {what, remedy} = explain(cause, missing)
    error = failed(what, remedy, lines)
    if missing, do: put_in(error.details["missing"], missing), else: error
  end

  defp explain(:disk, _) do
    {"The disk is full.",
     "Free some space, or give `--venv` (or VLLM_VENV) a folder on another disk. pip unpacks in " <>
       "TMPDIR, which may be a small disk too."}
  end

  defp explain(:memory, _), do: {"There is not enough memory.", "Stop other programs first."}

  defp explain(:permission, _) do
    {"pip may not write where it has to.",
     "Give `--venv` (or VLLM_VENV) a folder that you own, and see who owns pip's cache."}
  end

  defp explain(:certificate, _) do
    {"The package index shows a certificate that is not trusted here.",
     "Where a proxy of your network makes it, set PIP_CERT to its certificate."}
  end

  defp explain(:network, _) do
    {"The package index cannot be reached.",
     "See whether this machine is online, and set HTTPS_PROXY where a proxy is needed. What is " <>
       "already downloaded is kept: run `mix vllm.setup` again."}
  end

  defp explain(:compiler, _) do
    {"A package is compiled on this machine, and there is no C++ compiler.",
     "On Debian and Ubuntu: `apt-get install g++`; then run `mix vllm.setup` again."}
  end

  defp explain(:version, missing) do
    {"There is no build of #{missing || "a package"} for this Python and processor.",
     "Try another Python (`--python python3.11`). With a mirror as pip's index, see whether it " <>
       "is up to date."}
  end

  defp explain(:unknown, _), do: {"pip failed.", "See what it said below."}

  defp failed(what, remedy, lines) do
    last = lines |> Pip.printable() |> Enum.take(-20)
    Error.new(:vllm_not_installed, what <> " " <> remedy, %{"output" => last})
  end

  defp not_writable(path, reason) do
    Error.new(
      :vllm_not_installed,
      "#{path} cannot be written (#{:file.format_error(reason)}). Give `--venv` (or VLLM_VENV) a " <>
        "folder that you own.",
      %{"path" => path}
    )
  end

  defp write_stamp(plan, stamp) do
    case Stamp.write(plan.venv, stamp) do
      :ok -> :ok
      {:error, reason} -> {:error, not_writable(plan.venv, reason)}
    end
  end
end
